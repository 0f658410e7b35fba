import os
import re
import subprocess
import sys
from pathlib import Path

from tests.commands import Command
from tests.small_lm import write_model

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


def test_adapters_are_tuned_over_two_replicas_and_open_in_peft(tmp_path, free_port):
    from peft import AutoPeftModelForCausalLM

    base = write_model(tmp_path / "base")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": "2"}
    replicas = [
        Command(
            [ROOT / "examples" / "lora.py", base, 22],
            python=True,
            cwd=tmp_path,
            env={**os.environ, **meeting, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [replica.communicate(timeout=180) for replica in replicas]
    assert [replica.returncode for replica in replicas] == [0, 0], said
    output = said[0][0]
    sent_kb = float(re.search(r"trained 8,704 of 37,792 parameters, sent (\S+) kB in 22 steps", output)[1])
    # Two synchronizations of a bit an entry, and what replicas tell each other besides.
    assert 2 * 8_704 / 8e3 < sent_kb < 4
    before, after = map(float, re.search(r"perplexity on held-out text (\S+) -> (\S+),", output).groups())
    assert after < 0.95 * before
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "runs" / "lora_adapters")
    changed = [p for n, p in opened.named_parameters() if ".lora_B." in n]
    assert len(changed) == 14
    assert all(p.abs().max() > 0 for p in changed)
