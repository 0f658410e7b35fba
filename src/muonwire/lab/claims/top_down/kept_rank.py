"""topdown.7: "conditioning equals compression"."""

from collections.abc import Iterator

import torch
from torch import nn

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.top_down import NOTE
from muonwire.lab.inputs.optimizers import ADAM, MUON, ONE_BIT, OPTIMIZERS, points, task, trained
from muonwire.lab.measures.hidden_spectra import hidden_spectra
from muonwire.spectra.edit import edit_model
from muonwire.spectra.edits import Keep

COMPARED = (ADAM, MUON, ONE_BIT)
KEPT = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
HALF, QUARTER = 0.5, 0.25


def _loss(model: nn.Module, quick: bool) -> float:
    total, terms = task(1, quick).evaluate(model, rank=0, world_size=1)
    return total / terms


def measure(setting: Setting) -> Iterator[Row]:
    """Loss against the share of singular values that the hidden weights keep, for each optimizer’s weights."""
    folder = setting.input(OPTIMIZERS)
    costs: dict[tuple[str, float], float] = {}
    last = points(setting.quick)[-1]
    for name in COMPARED:
        models = trained(folder, name, seed=setting.seed, quick=setting.quick)
        model = next(m for step, m in models if step == last)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        hidden = [s["effective_rank"] for s in hidden_spectra(model, label=name)]
        whole = _loss(model, setting.quick)
        for kept in KEPT:
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(weights[n])
            edit_model(model, [Keep(fraction=kept)])
            loss = _loss(model, setting.quick)
            costs[name, kept] = loss - whole
            yield {
                "optimizer": name,
                "kept": 100 * kept,
                "loss": loss,
                "cost": loss - whole,
                "effective_rank": 100 * sum(hidden) / len(hidden),
            }
    for kept in (HALF, QUARTER):
        yield {"difference at": 100 * kept, "difference": costs[MUON, kept] - costs[ADAM, kept]}


def _check(kept: float, words: str) -> Check:
    return Check(
        setting="in training",
        column="difference",
        select={"difference at": 100 * kept},
        at_most=0.0,
        unit="nats a byte",
        reading=Reading(
            holds="a lower rank costs Muon’s weights no more than Adam’s",
            fails="a lower rank costs Muon’s weights more than Adam’s",
            by="by {size} nats a byte",
            where=f"where {words} of the singular values are kept",
        ),
    )


CLAIM = Claim(
    id="topdown.7",
    note=NOTE,
    says="conditioning equals compression, in a sense: a well-conditioned weight has its focus on a few important things",
    question="Do the better-conditioned weights, Muon’s, lose less than Adam’s when only the largest singular values are kept?",
    expected="No, Adam’s lose less. A well-conditioned matrix has no few important directions: its energy is spread over all of "
    "them, so cutting any of them costs. Whether Adam’s are better at that rank depends on where they start from.",
    measure=measure,
    inputs=(OPTIMIZERS,),
    checks=(_check(HALF, "half"), _check(QUARTER, "a quarter")),
    meaning={
        "confirmed": "Weights trained by Muon can be cut to a lower rank at less cost than Adam’s.",
        "refuted": "If you plan to factor the weights afterwards, measure it: the flatter the spectrum, the more cutting costs, "
        "and Muon’s lower loss can be eaten up.",
        "depends": "Whose weights lose less depends on how much is kept.",
    },
    tables=(
        Pivot(
            caption="Hidden weights cut to the largest singular values; cost is the loss above that of the whole weights, "
            "nats a byte",
            rows={"optimizer": "Optimizer", "kept": "Kept, %"},
            values={"loss": "Loss", "cost": "Cost", "effective_rank": "Effective rank of the whole, %"},
        ),
    ),
    plots=(
        Plot(
            name="kept",
            title="Loss against kept rank",
            how_to_read="All hidden weights cut alike. Bands are 95 % intervals over the seeds.",
            x=("kept", "Singular values kept, %"),
            y=("loss", "Evaluation loss, nats a byte"),
            series=("optimizer", "Optimizer"),
        ),
    ),
)
