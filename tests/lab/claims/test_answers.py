"""Every claim's answer on the measurements that are kept, and how each of its clauses reads in every state."""

import json
import re
from pathlib import Path

import pytest

from muonwire.lab.engine.catalog import load_claims, matter_most
from muonwire.lab.engine.check import FAILS, HOLDS, OPEN
from muonwire.lab.engine.run import rows_of
from tests.lab.claims.test_claims import triples

EVIDENCE = Path(__file__).parents[3] / "evidence" / "lab"
CLAIMS = load_claims()
MOST_CHARACTERS = 400


@pytest.fixture(scope="module")
def kept():
    return json.loads((EVIDENCE / "verdicts.json").read_text())


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_the_answer_is_one_sentence_with_a_figure(claim, kept):
    decision = claim.decide(rows_of(claim, out=EVIDENCE, quick=False)[0])
    assert re.search(r"\d", decision.answer)
    assert len(decision.answer) <= MOST_CHARACTERS
    assert decision.answer.endswith(").")
    assert "not measured" not in decision.answer.lower()
    entry = kept[claim.id]
    assert (entry["verdict"], entry["answer"]) == (decision.verdict, decision.answer)
    assert entry["note"] == claim.note.title
    assert entry["meaning"] == claim.meaning.get(decision.verdict, "")


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_every_clause_reads_differently_where_it_holds_fails_or_is_open(claim):
    for check in claim.checks:
        if check.reading is None:
            continue
        outcomes = [
            check.evaluate(
                [{"seed": seed, check.column: value, **check.select} for seed, value in enumerate(made)]
            )
            for made in triples(check)
        ]
        assert {o.state for o in outcomes} == {HOLDS, FAILS, OPEN}, check.name
        assert len({o.predicate for o in outcomes}) == 3
        for outcome in outcomes:
            assert re.search(r"\d", outcome.place)
            assert not re.search(r"[{}]", outcome.clause)


def test_the_ten_that_matter_most_are_claims_in_their_order():
    found = matter_most(list(load_claims().values()))
    assert len(found) == len({c.id for c in found.values()}) == 10
    assert all(question.endswith("?") for question in found)
    assert list(matter_most(list(load_claims().values())[::-1])) == list(found)
    assert matter_most([]) == {}
