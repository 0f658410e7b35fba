import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_runs_under_torchrun_and_learns():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "examples/local_muon.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    first, last, bits = map(float, re.search(r"loss (\S+) -> (\S+), (\S+) bit", done.stdout).groups())
    assert last < 0.5 * first
    assert bits < 0.15
