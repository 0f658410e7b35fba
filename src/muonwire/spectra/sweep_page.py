"""The page of a sweep: loss against strength, by kind of weights."""

from collections.abc import Sequence

from muonwire.pages import Chart, Page, Section, Table, text_table
from muonwire.pages.series import series_chart
from muonwire.pages.units import digits_text, file_slug, number_text, percent_text
from muonwire.spectra.compare_page import answers_table, conversations, likeness_table
from muonwire.spectra.likeness import Likeness
from muonwire.spectra.sweep import Point
from muonwire.spectra.talk import Answer

Outcome = tuple[str, Point, Likeness]


def sweep_page(
    label: str,
    original: Likeness,
    outcomes: Sequence[Outcome],
    *,
    talked: Sequence[str] = (),
    likenesses: Sequence[Likeness] = (),
    answers: Sequence[Sequence[Answer]] = (),
    facts: Sequence[str] = (),
) -> Page:
    """The page.

    Args:
        label: of the model.
        original: its measurement without an edit.
        outcomes: of the sweep.
        talked: the edits that were talked to, the original first.
        likenesses: of each of them.
        answers: of each of them, to the same prompts.
        facts: short facts about how the figures were made.
    """
    kinds = list(dict.fromkeys(kind for kind, _, _ in outcomes))
    sections = [
        Section(
            title="Loss against strength",
            anchor="strength",
            lead="How much worse the model predicts real text, by edit; the strength is the share of the singular values that an "
            "edit changes, its distance from no change, or, where a tenth is doubled, the place at which that tenth ends.",
            blocks=tuple(sweep_charts(original, outcomes)),
        ),
        Section(
            title="Every edit",
            anchor="edits",
            blocks=tuple(_table(original, outcomes, kind) for kind in kinds),
        ),
    ]
    if answers:
        sections.append(
            Section(
                title="Conversations",
                anchor="conversations",
                blocks=(
                    likeness_table(talked, likenesses),
                    answers_table(talked, answers),
                    *conversations(talked, answers),
                ),
            )
        )
    return Page(
        title=f"{label} with other singular values",
        kicker="muonwire spectra sweep",
        lead=f"{len(outcomes)} edits of the weights’ singular values, each measured against the original, whose loss is "
        f"{original.loss:.4f} nats a token (perplexity {digits_text(original.perplexity, digits=4)}).",
        facts=tuple(facts),
        sections=tuple(sections),
    )


def sweep_charts(original: Likeness, outcomes: Sequence[Outcome]) -> list[Chart]:
    """Loss above the original's against strength, a chart for each kind; both axes logarithmic."""
    charts = []
    for kind in dict.fromkeys(kind for kind, _, _ in outcomes):
        points = [
            {"x": p.strength, "y": max(found.loss - original.loss, 1e-4), "series": p.name}
            for k, p, found in outcomes
            if k == kind and found.loss != float("inf")
        ]
        charts.append(
            series_chart(
                points,
                name=f"strength-{file_slug(kind)}",
                title=f"Edits of {kind} weights",
                how_to_read="Nats a token above the original; smaller values than 0.0001 are drawn at 0.0001.",
                x_title="Strength",
                y_title="Loss above the original",
                log_x=True,
                log_y=True,
            )
        )
    return charts


def _table(original: Likeness, outcomes: Sequence[Outcome], kind: str) -> Table:
    columns = (
        *("Edit", "As text", "Strength", "Perplexity"),
        *("Loss above the original", "KL to it", "Same most likely token"),
    )
    rows = (
        (
            point.name,
            str(point.edit),
            digits_text(point.strength),
            number_text(found.perplexity),
            f"{found.loss - original.loss:+.4f}",
            number_text(found.kl),
            percent_text(found.agreement),
        )
        for its_kind, point, found in outcomes
        if its_kind == kind
    )
    return text_table(f"Edits of {kind} weights", columns, rows, names=2)
