import os
import re
import runpy
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.commands import context
from tests.integrations.launched import all_good, launched

ROOT = Path(__file__).parents[1]
LINE = r"(?:evaluation|loss) (\S+) -> (\S+), (\S+) bit per parameter and step, weights (\S+)"


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


def _process(path, rank, world_size, port, pipe):
    """What torchrun does for one process, forked from a server that has imported torch."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({key: str(value) for key, value in (own | there).items()})
    import torch

    torch.set_num_threads(1)
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(str(path), run_name="__main__")
    pipe.send(printed.getvalue())


def _run_forked(path, world_size):
    """What process 0 of an example prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe() for _ in range(world_size)]
    started = [
        context.Process(target=_process, args=(path, rank, world_size, port, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in started:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    printed = [ours.recv() if ours.poll(120) else None for ours, _ in pipes]
    for process in started:
        process.join(timeout=30)
    return printed[0]


def test_the_example_of_sharded_weights_learns_and_its_page_shows_what_it_prints():
    example = ROOT / "examples" / "fsdp.py"
    assert len(example.read_text().splitlines()) < 80
    printed = _run_forked(example, 4)
    pattern = r"loss (\S+) -> (\S+), (\S+) bit per parameter and step, weights [0-9a-f]{16}"
    first, last, bits = map(float, re.search(pattern, printed).groups())
    assert last < 0.2 * first
    # A sign every fifth step, and frames.
    assert 0.2 < bits < 0.22
    shown = re.search(pattern, (ROOT / "docs" / "sharded.md").read_text())
    assert shown is not None
    assert float(shown[1]) == first


def run_script(name, folder):
    """What a script prints in this process, which the launcher started."""
    import contextlib
    import io

    sys.argv = [name, folder]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(name, run_name="__main__")
    return printed.getvalue()


# The least that the loss falls to, as a share of what it was, and the bits that are sent at most.
@pytest.mark.parametrize(
    ("name", "share", "bits", "modules"),
    [
        ("trainer", 0.98, 0.25, ["transformers.trainer", "torch.utils.tensorboard"]),
        ("accelerate_loop", 0.5, 0.3, ["accelerate"]),
    ],
)
def test_an_example_of_a_framework_runs_on_two_replicas(name, share, bits, modules, tmp_path):
    script = str(ROOT / "examples" / f"{name}.py")
    printed = all_good(launched(run_script, 2, script, str(tmp_path), modules=modules))
    found = [re.search(rf"replica {rank}: {LINE}", text) for rank, text in enumerate(printed)]
    assert found[0][4] == found[1][4]
    for of_one in found:
        assert float(of_one[2]) < share * float(of_one[1])
        assert 0 < float(of_one[3]) < bits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replica_0", "replica_1"]
    # The page shows what a run of now would print, but for the numbers.
    recorded = (ROOT / "evidence" / "examples" / f"{name}.txt").read_text()
    assert shape(recorded) == shape("".join(printed))


def shape(text):
    """The lines without their numbers and digests; that of each replica once, in any order."""
    bare = re.sub(r"weights \S+", "weights", re.sub(r"\d[\d.e+-]*", "0", text))
    return sorted(bare.splitlines())
