"""The hypotheses of source 000, answered from the recipes of a comparison by rules; what is missing is named."""

from markupsafe import Markup

from muonwire.report.blocks import Block, Section, Terms
from muonwire.report.hypotheses.attention_first import attention_first
from muonwire.report.hypotheses.momentum_share import momentum_share
from muonwire.report.hypotheses.most_promising import most_promising
from muonwire.report.results import Results


def hypotheses_section(results: Results) -> Section:
    """The three answers, and the tables they follow from."""
    answers = (most_promising(results), momentum_share(results), attention_first(results))
    terms = Terms(
        items=tuple(
            (f"{a.name}: {a.claim}", Markup("<b>{}.</b> {}").format(a.verdict, a.text)) for a in answers
        )
    )
    blocks: tuple[Block, ...] = (terms, *(a.table for a in answers if a.table))
    chance = "" if results.num_seeds > 1 else " With one seed per recipe, how much is chance is not measured."
    return Section(
        title="Hypotheses of source 000",
        anchor="hypotheses",
        lead="Each verdict follows from this comparison’s losses and bits; with several seeds, a difference counts if every seed "
        f"bears it out.{chance}",
        blocks=blocks,
    )
