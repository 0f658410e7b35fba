"""The lab's page: what matters most, then every claim with its answer, the note's figures beside ours, and how it was measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from muonwire.lab.engine.catalog import matter_most
from muonwire.lab.engine.check import Row
from muonwire.lab.engine.claim import OWN, Claim
from muonwire.lab.engine.figures import excerpt_listings, pivot_table, plot_chart
from muonwire.lab.engine.run import machine, repeats_of, rows_of
from muonwire.lab.engine.verdict import Decision
from muonwire.pages import Block, Cell, Column, Page, Section, Table, Terms, render_page, write_png
from muonwire.pages.units import file_slug, seconds_text
from muonwire.train.checkpoint import write_json

PAGE_NAME = "lab.html"
VERDICTS_NAME = "verdicts.json"
# In place of an interval.
NOT_MEASURED = {"mean": None, "low": None, "high": None, "repeats": 0}


def write_report(claims: Sequence[Claim], *, out: Path, quick: bool, images: bool = True) -> list[Path]:
    """Write ``lab.html``, ``verdicts.json``, a PNG of each chart and a Parquet file of each claim's rows.

    Args:
        claims: those to show; one that was not measured says so.
        out: the lab's output.
        quick: show the quick measurements.
        images: write the PNGs.

    Returns:
        The paths written, the page first.
    """
    measured = {c.id: rows_of(c, out=out, quick=quick) for c in claims}
    inputs = {i.name: i.described(out, quick=quick) for c in claims for i in c.inputs}
    page = lab_page(claims, measured, quick=quick, inputs=inputs)
    out.mkdir(parents=True, exist_ok=True)
    path = out / PAGE_NAME
    path.write_text(render_page(page), encoding="utf-8")
    written = [path, write_verdicts(claims, measured, out=out, quick=quick)]
    (out / "rows").mkdir(exist_ok=True)
    for claim in claims:
        rows = measured[claim.id][0]
        if rows:
            target = out / "rows" / f"{claim.id}.parquet"
            pl.DataFrame(rows, infer_schema_length=None, strict=False).write_parquet(target)
            written.append(target)
    if not images:
        return written
    (out / "images").mkdir(exist_ok=True)
    return written + [write_png(chart, out / "images") for chart in page.charts]


def write_verdicts(
    claims: Sequence[Claim], measured: Mapping[str, tuple[list[Row], float]], *, out: Path, quick: bool
) -> Path:
    """The verdicts with the figures they follow from, for machines."""
    table: dict[str, Any] = {}
    for claim in claims:
        decision = claim.decide(measured[claim.id][0])
        table[claim.id] = {
            "verdict": decision.verdict,
            "answer": decision.answer,
            "meaning": meaning_of(claim, decision),
            "note": claim.note.title,
            "says": claim.says,
            "question": claim.question,
            "seeds": len({row["seed"] for row in measured[claim.id][0]}),
            "seeds_wanted": len(repeats_of(claim, quick=quick)),
            "checks": [
                {
                    "statement": o.check.name,
                    "setting": o.check.setting,
                    "wanted": o.check.wanted,
                    "state": o.state,
                    **(asdict(o.interval) if o.interval else NOT_MEASURED),
                }
                for o in decision.outcomes
            ],
        }
    write_json(out / VERDICTS_NAME, table)
    return out / VERDICTS_NAME


def lab_page(
    claims: Sequence[Claim],
    measured: Mapping[str, tuple[list[Row], float]],
    *,
    quick: bool,
    inputs: Mapping[str, str],
) -> Page:
    """The page of these claims.

    Args:
        claims: in order.
        measured: the rows of each, and the seconds that they took.
        quick: whether they are quick measurements.
        inputs: what each input is, by its name.
    """
    decided = {c.id: c.decide(measured[c.id][0]) for c in claims}
    counts = [d.verdict for d in decided.values()]
    verdicts = ", ".join(f"{counts.count(v)} {v}" for v in dict.fromkeys(counts))
    sections = _findings(claims, decided, measured)
    sections += [
        Section(
            title=note.title,
            anchor=file_slug(note.title),
            lead=note.about,
            blocks=(_overview([c for c in claims if c.note == note], decided),),
        )
        for note in dict.fromkeys(c.note for c in claims)
    ]
    sections += [_section(c, decided[c.id], *measured[c.id], quick=quick, inputs=inputs) for c in claims]
    return Page(
        title="The notes’ claims, measured",
        kicker="muonwire lab",
        lead=f"{len(claims)} claims of public notes on Muon and DisTrO, each measured at the note’s own setting and on "
        f"real gradients or in real training: {verdicts}. Every verdict comes out of a rule over repeated measurements.",
        facts=(machine(), *(["quick settings: no evidence"] if quick else [])),
        sections=tuple(sections),
        footer="Intervals are Student’s t, 95 %, over the seeds.",
    )


def anchor(claim: Claim) -> str:
    """The claim's address in the page."""
    return claim.id.replace(".", "-").lower()


def _findings(
    claims: Sequence[Claim], decided: Mapping[str, Decision], measured: Mapping[str, tuple[list[Row], float]]
) -> list[Section]:
    """What somebody who trains wants to know first; no section where none of it is measured."""
    items: list[tuple[str | Markup, str | Markup]] = []
    for question, claim in matter_most(claims).items():
        decision = decided[claim.id]
        if measured[claim.id][0]:
            link = Markup('{}<br><a href="#{}">{}: {}</a>').format(
                question, anchor(claim), claim.id, decision.verdict
            )
            found = decision.answer or decision.counts
            items.append((link, Markup("<b>{}</b><br>{}").format(found, meaning_of(claim, decision))))
    if not items:
        return []
    return [
        Section(
            title="What matters most if you train",
            anchor="findings",
            lead="What was found, in figures, and what to do about it.",
            blocks=(Terms(items=tuple(items)),),
        )
    ]


def meaning_of(claim: Claim, decision: Decision) -> str:
    """What the verdict means for somebody who trains; empty where the claim says nothing of it."""
    return claim.meaning.get(decision.verdict, "")


def _overview(claims: Sequence[Claim], decided: Mapping[str, Decision]) -> Table:
    rows = []
    for claim in claims:
        decision = decided[claim.id]
        link = Markup('<a href="#{}">{}</a>').format(anchor(claim), claim.id)
        rows.append(
            (
                Cell(text=link),
                Cell(text=Markup("<b>{}</b>").format(decision.verdict)),
                Cell(text=decision.answer or decision.counts),
                Cell(text=claim.says),
            )
        )
    return Table(
        caption="What came out, beside what the note says",
        columns=(
            Column(label="Claim", numeric=False),
            Column(label="Verdict", numeric=False),
            Column(label="What came out", numeric=False, words=True),
            Column(label="The note says", numeric=False, words=True),
        ),
        rows=tuple(rows),
    )


def _section(
    claim: Claim,
    decision: Decision,
    rows: list[Row],
    took_s: float,
    *,
    quick: bool,
    inputs: Mapping[str, str],
) -> Section:
    seeds = repeats_of(claim, quick=quick)
    measured = sorted({int(r["seed"] or 0) for r in rows})
    terms: list[tuple[str | Markup, str | Markup]] = [
        ("The note says" if claim.note != OWN else "The claim", claim.says),
        ("Question", claim.question),
        ("Expected", claim.expected),
    ]
    if decision.verdict in claim.meaning:
        terms.append(("If you train", meaning_of(claim, decision)))
    if claim.quoted:
        terms.append(
            ("The note’s figures", "; ".join(f"{what}: {value}" for what, value in claim.quoted.items()))
        )
    if claim.inputs:
        terms.append(("Measured on", "; ".join(inputs[i.name] for i in claim.inputs)))
    repeats = f"seeds {', '.join(map(str, measured))} of {len(seeds)}" if measured else "not measured yet"
    terms.append(("Repeats", f"{repeats}; {seconds_text(took_s)} in all"))
    command = f"muonwire lab run {claim.id}{' --quick' if quick else ''}"
    terms.append(("Command", command))
    blocks: list[Block] = [Terms(items=tuple(terms), code=frozenset({"Command"})), _checks(decision)]
    if rows:
        blocks += [pivot_table(p, rows) for p in claim.tables]
        blocks += [plot_chart(p, rows, claim=claim.id) for p in claim.plots]
        blocks += [block for e in claim.excerpts for block in excerpt_listings(e, rows)]
    return Section(
        title=f"{claim.id}: {decision.verdict}",
        anchor=anchor(claim),
        lead=Markup("<b>{}</b>").format(decision.answer or f"Of its statements, {decision.counts}."),
        blocks=tuple(blocks),
        listed=False,
    )


def _checks(decision: Decision) -> Table:
    return Table(
        caption="What decides",
        columns=(
            Column(label="Statement", numeric=False, words=True),
            Column(label="Where", numeric=False, words=True),
            Column(label="Wanted"),
            Column(label="Measured"),
            Column(label="Outcome", numeric=False),
        ),
        rows=tuple(
            tuple(
                Cell(text=t)
                for t in (
                    o.check.name,
                    o.check.setting,
                    o.check.wanted,
                    o.figure,
                    f"{o.state}; {o.seeds_text}" if o.seeds_text else o.state,
                )
            )
            for o in decision.outcomes
        ),
    )


def read_verdicts(path: Path) -> dict[str, str]:
    """The verdict with its answer by claim, of a ``verdicts.json``."""
    entries = json.loads(path.read_text())
    return {claim: f"{e['verdict']}. {e['answer']}".rstrip() for claim, e in entries.items()}
