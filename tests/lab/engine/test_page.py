"""The page: what matters most comes first, and every claim's section leads with its answer."""

from muonwire.lab import load_claims
from muonwire.lab.engine.catalog import matter_most
from muonwire.lab.engine.page import lab_page
from muonwire.pages import Terms


def rows_where_all_hold(claim):
    """Made rows in which each check with a reading holds, where no other check of the column says otherwise."""
    return [
        {
            "seed": 0,
            check.column: sum(v for v in (check.at_least, check.at_most) if v is not None),
            **check.select,
        }
        for check in claim.checks
    ]


def test_what_matters_most_comes_first_with_what_to_do(toy):
    claims = load_claims((toy,))
    shown = [claims["toy.1"], claims["integration.5"], claims["hypothesis.2"]]
    measured = {c.id: (rows_where_all_hold(c), 1.0) for c in shown}
    page = lab_page(shown, measured, quick=False, inputs={i.name: "made" for c in shown for i in c.inputs})
    first = page.sections[0]
    assert first.anchor == "findings"
    (block,) = first.blocks
    assert isinstance(block, Terms)
    # The order is that of the list and not of the page, and a claim of one's own is none of them.
    assert [term.split("#")[1].split('"')[0] for term, _ in block.items] == ["hypothesis-2", "integration-5"]
    assert list(matter_most(shown).values()) == [claims["hypothesis.2"], claims["integration.5"]]
    for claim, (_, found) in zip(matter_most(shown).values(), block.items, strict=True):
        decision = claim.decide(measured[claim.id][0])
        assert decision.answer
        assert decision.answer in found
        assert claim.meaning[decision.verdict].split("’")[0] in found


def test_a_section_leads_with_the_answer_and_a_claim_without_measurements_is_no_finding(toy):
    claims = load_claims((toy,))
    shown = [claims["toy.1"], claims["hypothesis.2"]]
    measured = {"toy.1": ([{"seed": 0, "heads": 0.5}], 1.0), "hypothesis.2": ([], 0.0)}
    page = lab_page(shown, measured, quick=False, inputs={"training": "made"})
    assert [s.anchor for s in page.sections if s.anchor == "findings"] == []
    leads = {s.anchor: s.lead for s in page.sections}
    assert leads["toy-1"] == "<b>A coin is fair (heads 0.50 of the time).</b>"
    assert "Not measured whether momentum" in leads["hypothesis-2"]
