"""A claim from a file through the command: measuring, keeping, resuming, failing, listing."""

import json

import pytest

from muonwire.errors import UsageError
from muonwire.lab import LabConfig, load_claims, run
from muonwire.lab.engine.run import read_repeat, repeat_file, rows_of
from muonwire.lab.engine.verdict import CONFIRMED, UNDECIDED
from muonwire.lab.inputs.text_training import TEXT_TRAINING
from tests.lab.engine.toy import TOY, command


def test_a_claim_is_one_file(toy, tmp_path, capsys):
    out = tmp_path / "lab"
    assert command("run", "toy.1", "--claims-from", toy, "--out", out, "--jobs", "1") == 0
    assert "toy.1: confirmed. A coin is fair (heads 0.50 of the time)." in capsys.readouterr().out
    page = (out / "lab.html").read_text()
    for shown in ("a coin falls on either side", "1/2", "Throw it.", "muonwire lab run toy.1"):
        assert shown in page
    verdict = json.loads((out / "verdicts.json").read_text())["toy.1"]
    assert verdict["verdict"] == CONFIRMED
    assert verdict["answer"] == "A coin is fair (heads 0.50 of the time)."
    assert verdict["meaning"] == "Throw it."
    assert verdict["note"] == "claims of your own"
    assert verdict["checks"][0]["repeats"] == 2
    assert (out / "images" / "toy-1-heads.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "rows" / "toy.1.parquet").stat().st_size
    assert command("list", "toy", "--claims-from", toy) == 0
    assert "“claims of your own”, 2 seeds: a coin falls" in capsys.readouterr().out


def test_repeats_are_kept_and_remeasured_when_the_version_rises(toy, tmp_path):
    claim = load_claims((toy,))["toy.1"]
    config = LabConfig(out=tmp_path / "lab", claims_from=(toy,), jobs=1)
    said = []
    assert run(config, [claim], say=said.append) == {}
    assert len(said) == 2
    kept = repeat_file(config.out, claim, 0).read_bytes()
    run(config, [claim], say=said.append)
    assert len(said) == 2
    repeat_file(config.out, claim, 1).write_text("{")
    run(config, [claim], say=said.append)
    assert len(said) == 3
    assert repeat_file(config.out, claim, 0).read_bytes() == kept
    toy.write_text(TOY.replace("repeats=2,", "repeats=2,\n    version=2,"))
    changed = load_claims((toy,))["toy.1"]
    assert read_repeat(config.out, changed, 0, quick=False) is None
    rows, took_s = rows_of(claim, out=config.out, quick=False)
    assert [r["seed"] for r in rows] == [0, 1]
    assert took_s > 0


def test_a_claim_that_fails_is_reported_and_costs_the_others_nothing(toy, tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text(
        TOY.replace("toy.1", "toy.2").replace("    heads = ", '    raise ValueError("no coin")\n    heads = ')
    )
    out = tmp_path / "lab"
    assert command("run", "toy", "--claims-from", toy, broken, "--out", out, "--jobs", "1") == 1
    printed = capsys.readouterr().out
    assert "no coin" in printed
    assert "muonwire lab run toy.2" in printed
    verdicts = json.loads((out / "verdicts.json").read_text())
    assert verdicts["toy.1"]["verdict"] == CONFIRMED
    assert verdicts["toy.2"]["verdict"] == UNDECIDED


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("run", "nothing.1"), "no claim 'nothing.1'"),
        (("run", "--jobs", "0"), "jobs is 0"),
        (("run", "--all", "conflict.1"), "both given"),
        (("rnu",), "'rnu' is not an action"),
        (("list", "--claims-from", "missing.py"), "missing.py is not a Python file"),
    ],
)
def test_bad_input_is_one_line(args, expected, capsys):
    assert command(*args) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_claim_reads_only_inputs_that_it_declares(toy):
    from muonwire.lab import Setting

    with pytest.raises(UsageError, match="'text-training'"):
        Setting(seed=0, quick=True, folder=toy.parent).input(TEXT_TRAINING)
