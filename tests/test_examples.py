"""Every example is short, has a page, and prints what the page shows: figures aside, which differ from machine to machine."""

import importlib.util
import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import Command
from tests.small_lm import write_model

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What the tests leave out of a program's work.
SHORTER = {"nanochat_like": ["20"]}


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("record_examples", ROOT / "docs" / "record_examples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape(text):
    """The text without its figures and digests, and without what the processor decides."""
    text = re.sub(r"on \S+ processors: \w+", "on some processors", text)
    text = re.sub(r"\b[0-9a-f]{16}\b", "digest", text)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "n", text)


def recorded(name):
    return (ROOT / "evidence" / "examples" / f"{name}.txt").read_text()


def under_torchrun(name, port, folder, *words, replicas=2, one_prints=True):
    """What is printed, by the first replica alone or by all; the processes are forked, with torchrun's variables."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    size = {"WORLD_SIZE": str(replicas), "LOCAL_WORLD_SIZE": str(replicas)}
    processes = [
        Command(
            [ROOT / "examples" / f"{name}.py", *SHORTER.get(name, []), *words],
            python=True,
            cwd=folder,
            env={**environment, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(replicas)
    ]
    said = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0] * replicas, said
    if one_prints:
        assert not any(out for out, _ in said[1:])
    return "".join(out for out, _ in said)


def numbers(pattern, text):
    return [tuple(map(float, found.groups())) for found in re.finditer(pattern, text)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_has_a_page(example, record):
    assert len(example.read_text().splitlines()) < 80
    assert record.commands(example)
    page = (ROOT / "docs" / "examples" / f"{example.stem}.md").read_text()
    assert recorded(example.stem).strip() in page
    assert f"examples/{example.stem}.md" in (ROOT / "mkdocs.yml").read_text()


def test_local_muon(free_port, tmp_path):
    printed = under_torchrun("local_muon", free_port, tmp_path)
    assert shape(printed) == shape(recorded("local_muon"))
    ((first, last, bits),) = numbers(r"loss (\S+) -> (\S+), (\S+) bit", printed)
    assert last < 0.5 * first
    assert bits < 0.15


def test_nanochat_like(free_port, tmp_path):
    printed = under_torchrun("nanochat_like", free_port, tmp_path)
    assert shape(printed) == shape(recorded("nanochat_like"))
    losses = [loss for (loss,) in numbers(r"loss (\d+\.\d+)", printed)]
    assert losses[-1] < 0.7 * losses[0]
    assert "hidden: 24 tensors, 196,608 parameters" in printed


def test_lightning_fit(free_port, tmp_path):
    printed = under_torchrun("lightning_fit", free_port, tmp_path)
    assert shape(printed) == shape(recorded("lightning_fit"))
    (first, _), *_, (last, bits) = numbers(r"loss (\S+), (\S+) bit", printed)
    assert last < 0.5 * first
    # One bit every fifth step.
    assert 0.15 < bits < 0.25
    parts = {path.name for path in (tmp_path / "runs" / "lightning_fit").iterdir()}
    assert {"last.ckpt", "last.ckpt.replica1"} < parts


# The least that the loss falls to, as a share of what it was, and the bits that are sent at most.
@pytest.mark.parametrize(("name", "share", "bits"), [("trainer", 0.98, 0.25), ("accelerate_loop", 0.5, 0.3)])
def test_a_framework_runs_on_two_replicas(name, share, bits, free_port, tmp_path):
    printed = under_torchrun(name, free_port, tmp_path, one_prints=False)
    assert sorted(shape(printed).splitlines()) == sorted(shape(recorded(name)).splitlines())
    pattern = r"replica \d: (?:evaluation|loss) (\S+) -> (\S+), (\S+) bit"
    for first, last, sent in numbers(pattern, printed):
        assert last < share * first
        assert 0 < sent < bits
    assert len(set(re.findall(r"weights (\S+)", printed))) == 1
    (folder,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["replica_0", "replica_1"]


def test_fsdp(free_port, tmp_path):
    printed = under_torchrun("fsdp", free_port, tmp_path, replicas=4)
    assert shape(printed) == shape(recorded("fsdp"))
    ((first, last, bits),) = numbers(r"loss (\S+) -> (\S+), (\S+) bit", printed)
    assert last < 0.2 * first
    # A sign every fifth step, and frames.
    assert 0.2 < bits < 0.22


def test_lora_tunes_adapters_that_open_in_peft(free_port, tmp_path):
    from peft import AutoPeftModelForCausalLM

    printed = under_torchrun("lora", free_port, tmp_path, write_model(tmp_path / "base"), 22)
    assert shape(printed.replace("8,704 of 37,792", "2,442,240 of 136,957,248")) == shape(recorded("lora"))
    ((sent_kb,),) = numbers(r"trained 8,704 of 37,792 parameters, sent (\S+) kB in 22 steps", printed)
    # Two synchronizations of a bit an entry, and what replicas tell each other besides.
    assert 2 * 8_704 / 8e3 < sent_kb < 4
    ((before, after),) = numbers(r"perplexity on held-out text (\S+) -> (\S+),", printed)
    assert after < 0.95 * before
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "runs" / "lora_adapters")
    changed = [p for n, p in opened.named_parameters() if ".lora_B." in n]
    assert len(changed) == 14
    assert all(p.abs().max() > 0 for p in changed)


def test_two_hosts(free_port, tmp_path):
    printed = under_torchrun("two_hosts", free_port, tmp_path, one_prints=False)
    lines = sorted(printed.splitlines())
    assert list(map(shape, lines)) == [shape(line) for line in sorted(recorded("two_hosts").splitlines())]
    (first, last), _ = numbers(r"loss (\S+) -> (\S+),", printed)
    assert last < 0.5 * first
    # What one host sends, the other receives.
    (sent, received), other = numbers(r"(\S+) kB sent, (\S+) kB received", printed)
    assert other == (received, sent)
    assert len(set(re.findall(r"weights (\S+)", printed))) == 1


@contextmanager
def lighthouse(record, port):
    command = record.commands(ROOT / "examples" / "elastic_loop.py")[0].replace("29510", str(port))
    with subprocess.Popen(record.words(command), stderr=subprocess.DEVNULL) as process:
        yield f"127.0.0.1:{port}"
        process.kill()


def test_elastic_loop(record, free_port, tmp_path):
    with lighthouse(record, free_port) as place:
        _, *commands = record.commands(ROOT / "examples" / "elastic_loop.py")
        processes = [
            Command(words, python=True, cwd=tmp_path)
            for words in ([ROOT / "examples" / "elastic_loop.py", place, *c.split()[3:]] for c in commands)
        ]
        said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    ends = [re.search(r"ends after step (\d+), loss (\S+), weights (\S+)", out).groups() for out, _ in said]
    assert [int(step) for step, _, _ in ends] == [200, 200, 100]
    assert ends[0][2] == ends[1][2] != ends[2][2]
    assert all(float(loss) < 0.02 for _, loss, _ in ends)
    for name, other, (out, _) in zip(("ada", "bob"), ("bob", "ada"), said, strict=False):
        first = out.splitlines()[0]
        assert first.startswith(f"{name}: begins at step ")
        assert other in first or "eve" in first
        assert f"{name}: step 110, now with ada, bob" in out
