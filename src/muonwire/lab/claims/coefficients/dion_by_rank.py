"""dion.1: Dion against Muon: quality, bytes and state by rank."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from muonwire import recipes
from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.coefficients import NOTE
from muonwire.lab.inputs.captured import hidden_matrices
from muonwire.lab.inputs.training import CURVES, OUTCOMES, TRAINING, Results, Trained
from muonwire.tasks.models import build_llama

FRACTIONS = {
    1.0: "dion(fraction=1.0)",
    0.5: "dion(fraction=0.5)",
    0.25: "dion",
    0.125: "dion(fraction=0.125)",
}
RECIPES = {
    "dense Muon": "muon",
    **{f"Dion, rank fraction {f:g}": recipe for f, recipe in FRACTIONS.items()},
    "AdamW": "adamw",
}
RANK = 16


def held_bytes(state: object) -> int:
    """Bytes of all tensors in a state, however deep."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    inner = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(held_bytes(value) for value in inner)


def state_bytes(recipe: str, model: nn.Module, params: list[nn.Parameter]) -> int:
    """Bytes of the optimizer's state of ``params`` after a step."""
    name, options = recipes.parse_recipe(recipe)
    optimizer = recipes.build(name, model, lr=1e-3, **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return sum(held_bytes(optimizer.state[p]) for p in params)


def _state(setting: Setting) -> Iterator[Row]:
    for label, recipe in RECIPES.items():
        model = build_llama("pico", vocabulary=256, sequence=64, seed=0)
        hidden = list(hidden_matrices(model).values())
        weights = sum(p.numel() for p in hidden)
        yield {"recipe": label, "state": state_bytes(recipe, model, hidden) / weights}
    widths = setting.pick((64, 128, 256, 512, 1024), (64, 128))
    for kind in ("Muon", "Dion"):
        held = {}
        for n in widths:
            model = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(3)))
            recipe = "muon" if kind == "Muon" else f"dion(fraction={RANK / n})"
            middle = model[1].weight
            assert isinstance(middle, nn.Parameter)
            held[n] = state_bytes(recipe, model, [middle])
            yield {"state of": kind, "n": n, "kb": held[n] / 1000}
        exponent = math.log(held[widths[-1]] / held[widths[0]]) / math.log(widths[-1] / widths[0])
        yield {"growth of": kind, "exponent": exponent}


def _hidden_bytes(run: Trained, muon: Trained) -> float:
    model = build_llama("pico", vocabulary=256, sequence=64, seed=0)
    hidden = sum(p.numel() for p in hidden_matrices(model).values())
    everything = sum(p.numel() for p in model.parameters())
    # Embedding, head and vectors are sent densely by both recipes.
    return run.sent_bytes - muon.sent_bytes * (1 - hidden / everything)


def measure(setting: Setting) -> Iterator[Row]:
    """Loss, bytes on the hidden matrices and state of Dion at four ranks, beside dense Muon."""
    runs = Results(setting.input(TRAINING), seed=setting.seed)
    muon = runs["muon"]
    dense, full = _hidden_bytes(muon, muon), _hidden_bytes(runs[FRACTIONS[1.0]], muon)
    yield from runs.rows(RECIPES)
    yield from _state(setting)
    for fraction, recipe in FRACTIONS.items():
        sent = _hidden_bytes(runs[recipe], muon)
        yield {
            "fraction": fraction,
            "loss": runs[recipe].loss,
            "hidden_kb": sent / 1000,
            "less_than_full": full / sent,
            "less_than_dense": dense / sent,
        }
    others = [runs[r].loss for f, r in FRACTIONS.items() if f != 1.0 and not math.isnan(runs[r].loss)]
    best_other = min(others, default=math.nan)
    yield {"full rank": "beside the others", "lead": best_other - runs[FRACTIONS[1.0]].loss}


def _halved(column: str, setting: str, subject: str, halves: str) -> Check:
    return Check(
        name="half rank sends two times less, within a tenth",
        setting=setting,
        column=column,
        select={"fraction": 0.5},
        at_least=1.8,
        at_most=2.2,
        unit="times",
        reading=Reading(
            holds=f"{subject} sends {halves}",
            fails=f"{subject} does not send {halves}",
            by="{mean} times less",
        ),
    )


CLAIM = Claim(
    id="dion.1",
    note=NOTE,
    says="Muon is stateless and needs whole matrices, Dion keeps a matrix Q and error feedback; full rank has the best quality, "
    "half and a quarter of it reduce communication 2 and 4 times; its state is O(rank × dim) instead of O(dim²)",
    quoted={
        "communication, half rank": "2x",
        "communication, quarter rank": "4x",
        "state of Muon": "Stateless",
        "state of Dion": "O(rank × dim)",
    },
    question="At rank fractions 1, 1/2, 1/4 and 1/8: which trains best, how near to dense Muon; what is sent for the hidden "
    "matrices, beside full rank and dense Muon; and how does the state grow with the width at a fixed rank?",
    expected="Full rank is best and near Muon. Bytes fall with the rank as stated, but from twice those of dense Muon on square "
    "matrices, since both factors are sent: half rank saves nothing there. The state is O(dim²): the error feedback is a whole "
    "momentum buffer, as large as Muon’s, which is not stateless either, and Q comes on top.",
    measure=measure,
    inputs=(TRAINING,),
    checks=(
        Check(
            setting="in training",
            column="lead",
            select={"full rank": "beside the others"},
            at_least=0.0,
            unit="nats a token below the best other",
            reading=Reading(
                holds="of Dion’s ranks full rank ends with the lowest loss",
                fails="of Dion’s ranks a lower one ends below full rank",
                by="by {size} nats a token",
            ),
        ),
        Check(
            setting="in training beside dense Muon",
            column="over_muon",
            select={"recipe": "Dion, rank fraction 1"},
            at_most=1.0,
            possible=(-100.0, math.inf),
            unit="%",
            reading=Reading(
                holds="full rank is at most 1 % above dense Muon",
                fails="full rank is more than 1 % above dense Muon",
            ),
        ),
        _halved("less_than_full", "by bytes beside full rank", "half rank", "half of full rank’s bytes"),
        _halved("less_than_dense", "by bytes beside dense Muon", "it", "half of dense Muon’s"),
        Check(
            setting="by bytes of state",
            column="exponent",
            select={"growth of": "Dion"},
            at_most=1.5,
            possible=(0.0, math.inf),
            reading=Reading(
                holds="at a fixed rank the state grows about as the width",
                fails="at a fixed rank the state grows much faster than the width",
                by="as its power {mean}",
            ),
        ),
        Check(
            setting="by bytes of state",
            column="state",
            select={"recipe": "dense Muon"},
            at_most=0.0,
            possible=(0.0, math.inf),
            unit="bytes a weight",
            reading=Reading(holds="Muon is stateless", fails="Muon is not stateless"),
        ),
    ),
    meaning={
        "confirmed": "Choose Dion’s rank by your link: bytes and state fall with it as the note says.",
        "refuted": "Nothing of the note’s account of Dion holds; choose by the table.",
        "depends": "Compare the table’s bytes with dense Muon’s, of which full rank sends more. Low rank saves no memory as long "
        "as the error feedback holds the whole momentum: plan for Muon’s buffer and Q on top.",
    },
    tables=(
        Pivot(
            caption="By rank fraction: final loss, nats a token; kB a step for the hidden matrices; how many times "
            "less than at full rank and than dense Muon",
            rows={"fraction": "Rank fraction"},
            values={
                "loss": "Loss",
                "hidden_kb": "Sent",
                "less_than_full": "Less than at full rank",
                "less_than_dense": "Less than dense Muon",
            },
            quoted={
                (0.5,): {"less_than_full": "2x"},
                (0.25,): {"less_than_full": "4x"},
            },
        ),
        Pivot(
            caption="State of a hidden weight, bytes; the weight itself has 4",
            rows={"recipe": "Recipe"},
            values={"state": "State"},
        ),
        Pivot(
            caption="At rank 16: state of an n×n matrix, by the power of n that it grows with",
            rows={"growth of": "Optimizer"},
            values={"exponent": "Power"},
            quoted={("Muon",): {"exponent": "Stateless"}, ("Dion",): {"exponent": "O(rank × dim)"}},
        ),
        OUTCOMES,
    ),
    plots=(
        CURVES,
        Plot(
            name="state",
            title="State of an n×n matrix at rank 16",
            how_to_read="A slope of two is O(dim²), of one O(rank × dim).",
            x=("n", "n"),
            y=("kb", "kB"),
            series=("state of", "Optimizer"),
            log_x=True,
            log_y=True,
        ),
    ),
)
