"""From what checks say to a verdict, and to one sentence."""

from muonwire.lab import Check, Decision, all_needed, unanimous
from muonwire.lab.engine.check import Reading
from muonwire.lab.engine.verdict import CONFIRMED, DEPENDS, REFUTED, UNDECIDED
from tests.lab.engine.toy import check


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
