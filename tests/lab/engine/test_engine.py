"""The lab itself, with a toy claim from a file: measuring, keeping, resuming, failing, deciding, listing."""

import json
import textwrap

import pytest

from muonwire.cli.main import main
from muonwire.errors import UsageError
from muonwire.lab import Check, Decision, Interval, LabConfig, all_needed, choose, load_claims, run, unanimous
from muonwire.lab.engine.check import FAILS, HOLDS, OPEN, Reading, by_seed
from muonwire.lab.engine.run import read_repeat, repeat_file, rows_of
from muonwire.lab.engine.verdict import CONFIRMED, DEPENDS, REFUTED, UNDECIDED
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.language_model import LANGUAGE_MODEL
from muonwire.lab.inputs.text_training import TEXT_TRAINING
from tests.spectra.conftest import build_small

TOY = textwrap.dedent(
    '''
    """toy.1: coins are fair."""

    import torch

    from muonwire.lab import Check, Claim, Pivot, Plot, Reading


    def measure(setting):
        """Heads of many throws."""
        heads = torch.rand(10_000, generator=setting.generator()) < 0.5
        return [{"coin": "made", "heads": float(heads.float().mean()), "throws": setting.pick(10_000, 10_000)}]


    CLAIM = Claim(
        id="toy.1",
        says="a coin falls on either side equally often",
        quoted={"heads": "one half"},
        question="How often is it heads?",
        expected="As often as not.",
        measure=measure,
        checks=(
            Check(
                name="heads are between 0.45 and 0.55 of all throws",
                setting="as in the note",
                column="heads",
                at_least=0.45,
                at_most=0.55,
                possible=(0.0, 1.0),
                reading=Reading(holds="a coin is fair", fails="a coin is not fair", by="heads {mean} of the time"),
            ),
        ),
        verdicts=("confirmed", "refuted", "undecided"),
        meaning={"confirmed": "Throw it.", "refuted": "Keep it."},
        tables=(
            Pivot(caption="Heads", rows={"coin": "Coin"}, values={"heads": "Heads"}, quoted={("made",): {"heads": "1/2"}}),
        ),
        plots=(
            Plot(name="heads", title="Heads", how_to_read="Higher is more.", x=("coin", "Coin"), y=("heads", "Heads"), mark="bar"),
        ),
        repeats=2,
    )
    '''
)


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path


def command(*args):
    with pytest.raises(SystemExit) as stop:
        main(["lab", *map(str, args)])
    return stop.value.code


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


def test_two_claims_of_one_id_are_refused(toy, tmp_path):
    again = tmp_path / "again.py"
    again.write_text(TOY)
    with pytest.raises(UsageError, match=r"two claims are named toy\.1"):
        load_claims((toy, again))
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(UsageError, match="neither CLAIM nor CLAIMS"):
        load_claims((empty,))


def test_a_claim_reads_only_inputs_that_it_declares(toy):
    from muonwire.lab import Setting

    with pytest.raises(UsageError, match="'text-training'"):
        Setting(seed=0, quick=True, folder=toy.parent).input(TEXT_TRAINING)


def test_the_interval_is_students():
    # t of 0.975 with two degrees of freedom is 4.3027.
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert Interval.of([5.0]) == Interval(mean=5.0, low=5.0, high=5.0, repeats=1)
    with pytest.raises(UsageError, match="no values"):
        Interval.of([])


def test_by_seed_averages_within_a_seed_and_leaves_out_what_is_missing():
    rows = [
        {"seed": 1, "x": 1.0, "data": "a"},
        {"seed": 0, "x": 2.0, "data": "a"},
        {"seed": 0, "x": 4.0, "data": "a"},
        {"seed": 0, "x": 9.0, "data": "b"},
        {"seed": 2, "x": None, "data": "a"},
        {"seed": 3, "data": "a"},
    ]
    assert by_seed(rows, column="x", select={"data": "a"}) == [3.0, 1.0]


def check(**changes):
    return Check(
        **{
            "name": "x is large",
            "setting": "here",
            "column": "x",
            "at_least": 1.0,
            "possible": (0.0, 2.0),
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ((1.5, 1.6, 1.5), HOLDS),
        ((0.1, 0.2, 0.1), FAILS),
        ((0.5, 1.5, 1.0), OPEN),
        ((), OPEN),
        ((1.2,), HOLDS),
    ],
)
def test_a_check_holds_where_its_whole_interval_does(values, state):
    rows = [{"seed": seed, "x": value} for seed, value in enumerate(values)]
    outcome = check().evaluate(rows)
    assert outcome.state == state
    assert (outcome.figure == "not measured") == (not values)


@pytest.mark.parametrize(
    "changes", [{"at_least": None}, {"at_least": 3.0}, {"at_least": -1.0}, {"at_least": 1.0, "at_most": 0.5}]
)
def test_a_check_that_can_tell_nothing_is_refused(changes):
    with pytest.raises(UsageError, match="x is large"):
        check(**changes)


def test_the_rules():
    def of(*values):
        return [
            check(setting=str(i)).evaluate([{"seed": 0, "x": v}]) if v else check().evaluate([])
            for i, v in enumerate(values)
        ]

    assert unanimous(of(1.5, 1.5)) == CONFIRMED
    assert unanimous(of(0.5, 0.5)) == REFUTED
    assert unanimous(of(1.5, 0.5, None)) == DEPENDS
    assert unanimous(of(1.5, None)) == UNDECIDED
    assert all_needed(of(1.5, 0.5)) == REFUTED
    assert all_needed(of(1.5, None)) == UNDECIDED
    assert all_needed(of(1.5)) == CONFIRMED


def test_families_are_chosen_by_their_word():
    claims = load_claims()
    assert choose(claims, []) == list(claims.values())
    assert next(iter(choose(claims, ["integration.3", "integration"]))).id == "integration.3"
    with pytest.raises(UsageError, match="allowed are"):
        choose(claims, ["integration.99"])


def test_a_verdict_answers_in_one_sentence_with_figures():
    reading = Reading(holds="it is large", fails="it is small", by="{size} by {mean}")
    checks = [
        Check(
            name="it is large",
            setting=at,
            column="x",
            select={"at": at},
            at_least=1.0,
            unit="m",
            reading=None if at == "unread" else reading,
        )
        for at in ("here", "there", "between", "nowhere", "unread")
    ]
    places = {"here": (2.0, 2.0), "there": (-0.449, -0.449), "between": (0.0, 2.0), "unread": (3.0, 3.0)}
    rows = [{"seed": s, "at": at, "x": x[s]} for s in (0, 1) for at, x in places.items()]
    decision = Decision(verdict="depends", outcomes=tuple(c.evaluate(rows) for c in checks))
    assert decision.answer == (
        "It is large (2.0 by 2.0); it is small (0.45 by −0.45); open whether it is large (−12 to 14 m); "
        "not measured whether it is large."
    )
    assert decision.counts == "2 holds, 1 fails, 2 open"
    assert Decision(verdict="depends", outcomes=(checks[-1].evaluate(rows),)).answer == ""


def test_clauses_that_differ_in_where_are_joined():
    checks = [
        check(
            setting=at,
            select={"at": at},
            reading=Reading(holds="x is large", fails="x is small", where=f"in {at}", by="{mean} m"),
        )
        for at in ("Ulm", "Bern", "Rome")
    ]
    rows = [{"seed": 0, "at": at, "x": x} for at, x in (("Ulm", 1.5), ("Bern", 0.25), ("Rome", 1.75))]
    decision = Decision(verdict="depends", outcomes=tuple(c.evaluate(rows) for c in checks))
    assert decision.answer == "X is large in Ulm (1.5 m) and in Rome (1.8 m); x is small in Bern (0.25 m)."
    assert Decision(verdict="undecided", outcomes=tuple(c.evaluate([]) for c in checks[:2])).answer == (
        "Not measured whether x is large in Ulm and in Bern."
    )


@pytest.mark.parametrize(
    ("value", "by", "shown"),
    [
        (11_970.0, "{mean}", "12,000"),
        (-0.0499, "{mean}", "−0.050"),
        (-2.0, "{size}", "2.0"),
        (3.0, "{power}", "1,000"),
        (500.0, "{low} to {high}", "500 to 500"),
    ],
)
def test_figures_have_as_many_digits_as_a_reading_asks_for(value, by, shown):
    reading = Reading(holds="so", fails="so", by=by)
    one = Check(name="n", setting="s", column="x", at_least=0.0, reading=reading)
    assert one.evaluate([{"seed": 0, "x": value}]).clause == f"so ({shown})"


@pytest.mark.parametrize(
    ("given", "instead", "message"),
    [
        (
            "    says=",
            '    source="source 000",\n    says=',
            r"toy\.py gives a claim a source; leave it out, or give note=",
        ),
        (
            "    repeats=2,",
            '    inputs=("text-training",),',
            r"inputs are \['text-training'\].*TEXT_TRAINING",
        ),
    ],
)
def test_a_claim_file_of_before_says_what_to_change(toy, given, instead, message):
    toy.write_text(TOY.replace(given, instead))
    with pytest.raises(UsageError, match=message):
        load_claims((toy,))


def test_another_type_error_in_a_claim_file_stays_what_it_is(toy):
    toy.write_text("1 + 'one'")
    with pytest.raises(TypeError, match="unsupported operand"):
        load_claims((toy,))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_of_the_language_model_that_is_named(kind, tmp_path):
    place = tmp_path / f"small-{kind}"
    build_small(kind).save_pretrained(place)
    one, out = LANGUAGE_MODEL, tmp_path / "lab"
    folder = one.prepare(out, quick=False, model=str(place))
    found = list(captured(folder, kind="momentum"))
    # Two layers: the first and the last, which is the middle too.
    assert len(found) == 2 * (7 if kind == "llama" else 4)
    assert all(float(c.matrix.norm()) > 0 for c in found)
    assert f"pretrained small-{kind} " in one.described(out, quick=False)
    with pytest.raises(UsageError, match=r"not from smollm2; give the measurements of another model.*--out"):
        one.prepare(out, quick=False)
    with pytest.raises(UsageError, match="not from smollm2"):
        run(LabConfig(ids=("future.1",), out=out), choose(load_claims(()), ("future.1",)))
    assert one.prepare(out, quick=False, model=str(place)) == folder
