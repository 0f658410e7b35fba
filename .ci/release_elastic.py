"""What the extra elastic is for: two replicas find each other through a lighthouse, train, and end with the same weights."""

import json
import subprocess
import sys
from pathlib import Path

PORT = 29533
TRAIN = "--recipe one_bit_muon(interval=2) --model-size pico --batch 2 --evaluation-sequences 4 --steps 4"
ELASTIC = f"--elastic --lighthouse 127.0.0.1:{PORT} --min-replicas 2"


def main() -> int:
    """Run both to their ends."""
    here = Path(sys.executable).parent
    lighthouse = subprocess.Popen(
        [here / "torchft_lighthouse", "--bind", f"127.0.0.1:{PORT}", "--min_replicas", "2"],
        stderr=subprocess.DEVNULL,
    )
    try:
        command = [here / "muonwire", "train", *TRAIN.split(), *ELASTIC.split()]
        replicas = [subprocess.Popen([*command, "--out", name]) for name in ("first", "second")]
        codes = [replica.wait(300) for replica in replicas]
    finally:
        lighthouse.kill()
    if codes != [0, 0]:
        return 1
    results = [json.loads((Path(name) / "result.json").read_text()) for name in ("first", "second")]
    alike = results[0]["weights_digest"] == results[1]["weights_digest"]
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
