"""topdown.4: what becomes of the scaling that orthogonalizing removes."""

import statistics
from collections.abc import Iterator

import torch

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.top_down import NOTE
from muonwire.lab.inputs.optimizers import ADAM, MUON, ONE_BIT, OPTIMIZERS, final_loss, trained
from muonwire.lab.measures.hidden_spectra import HIDDEN, hidden_spectra
from muonwire.spectra.measure import singular_values, spectrum
from muonwire.spectra.weights import weights_of

COMPARED = (ADAM, MUON, ONE_BIT)


def measure(setting: Setting) -> Iterator[Row]:
    """Spectra of weights, and of how far they moved, through training from the same start."""
    folder = setting.input(OPTIMIZERS)
    losses = {name: final_loss(folder, name, seed=setting.seed) for name in COMPARED}
    for name in COMPARED:
        start: dict[str, torch.Tensor] = {}
        row: dict[str, float | str] = {}
        for step, model in trained(folder, name, seed=setting.seed, quick=setting.quick):
            hidden = {n: m for w in weights_of(model) if w.group in HIDDEN for n, m in w.matrices()}
            start = start or {n: m.clone() for n, m in hidden.items()}
            found = hidden_spectra(model, label=name)
            moved = [
                spectrum(singular_values(n, m - start[n]), shape=(m.shape[0], m.shape[1]), eps=1e-7)
                for n, m in hidden.items()
                if not torch.equal(m, start[n])
            ]
            row = {
                "optimizer": name,
                "step": step,
                "condition": statistics.median(s["condition"] for s in found),
                "effective_rank": 100 * statistics.fmean(s["effective_rank"] for s in found),
                "stable_rank": 100 * statistics.fmean(s["stable_rank"] for s in found),
                "largest": statistics.fmean(s["largest"] for s in found),
            }
            if moved:
                row["moved_effective_rank"] = 100 * statistics.fmean(s.effective_rank for s in moved)
                row["moved_spread"] = statistics.median(s.stable_rank**-0.5 for s in moved)
            yield row
        over_adam = 100 * (losses[name] / losses[ADAM] - 1)
        last = {k: v for k, v in row.items() if k != "step"}
        yield {**last, "at": "end", "loss": losses[name], "over_adam": over_adam}


CLAIM = Claim(
    id="topdown.4",
    note=NOTE,
    says="Newton–Schulz removes the scaling of the update, and this is nothing to worry about",
    question="Do weights trained with orthogonalized updates lose their own scaling, that is, the differences between "
    "their singular values, and does it cost loss?",
    expected="One update has no scaling; hundreds of them in changing directions add up where they agree and cancel where they "
    "do not, so that the change of the weight has large and small singular values again. How large a layer’s step is comes from "
    "the learning rate, which is shared. Muon’s weights have a flatter spectrum than Adam’s, and no higher loss.",
    measure=measure,
    inputs=(OPTIMIZERS,),
    checks=(
        Check(
            setting="in training",
            column="over_adam",
            select={"optimizer": MUON, "at": "end"},
            at_most=0.0,
            unit="%",
            reading=Reading(
                holds="Muon, which removes the scaling of each update, ends with no higher loss than Adam",
                fails="Muon, which removes the scaling of each update, ends with a higher loss than Adam",
            ),
        ),
        Check(
            setting="in training",
            column="moved_spread",
            select={"optimizer": MUON, "at": "end"},
            at_least=2.0,
            possible=(1.0, 1e6),
            unit="times the root mean square",
            reading=Reading(
                holds="what its steps add up to is scaled again",
                fails="what its steps add up to is hardly scaled",
                by="largest singular value {mean} times the root mean square",
            ),
        ),
    ),
    meaning={
        "confirmed": "Orthogonalizing takes the scale out of each step, not out of the weights. Choose the size of a layer’s "
        "steps by the rate and its scale by shape.",
        "refuted": "The scaling is lost in the weights too, and the loss suffers.",
        "depends": "Either the weights lose their scaling and the loss is no worse for it, or they keep it and the loss is worse.",
    },
    tables=(
        Pivot(
            caption="At the end of training. W − W₀ is how far the hidden weights moved; its spread is σ₁ over the root mean "
            "square of its singular values, 1 for an orthogonal matrix",
            rows={"optimizer": "Optimizer"},
            values={
                "loss": "Final loss, nats a byte",
                "over_adam": "Above Adam, %",
                "condition": "Condition of W",
                "effective_rank": "Effective rank of W, %",
                "stable_rank": "Stable rank of W, %",
                "largest": "Largest σ of W",
                "moved_effective_rank": "Effective rank of W − W₀, %",
                "moved_spread": "Spread of W − W₀",
            },
            select={"at": "end"},
        ),
    ),
    plots=(
        Plot(
            name="effective-rank",
            title="Effective rank of the hidden weights through training",
            how_to_read="Share of r, mean over the matrices; all start from the same weights. Higher is flatter.",
            x=("step", "Step"),
            y=("effective_rank", "Effective rank, % of r"),
            series=("optimizer", "Optimizer"),
        ),
        Plot(
            name="moved",
            title="Effective rank of what training added to the weights",
            how_to_read="Of W − W₀. A single step of Muon is flat, at 100 %; sums of steps are not.",
            x=("step", "Step"),
            y=("moved_effective_rank", "Effective rank, % of r"),
            series=("optimizer", "Optimizer"),
        ),
    ),
)
