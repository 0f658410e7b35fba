"""Screens variants of local Muon: all replicas of a run as one batch of matrices, bits by formula.

Several times faster than replicas of their own, and good for finding out what is worth a real comparison; what it prints is no
evidence: payloads are not made, and headers and index coding are taken at their entropy.

python benchmarks/screen_local_steps.py --steps 500 --lr 0.02
python benchmarks/screen_local_steps.py --steps 1500 --lr 0.014 --only dense-0.9 H10-signs-o0.9-m0.3

Each run of it is an experiment of its own, in docs/experiments.md; the tests run it for two steps.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from muonwire.codec.transform.dct import cosine_basis
from muonwire.polar import polar
from muonwire.polar.schedules import find
from muonwire.stages.scale import shape_scale
from muonwire.tasks import MODEL_SIZES, TextSettings, TextTask
from muonwire.train.schedule import lr_factor

Tensors = dict[str, Tensor]
# (replicas, ...) to what the others decode, and the bits of one replica's payload.
Coding = Callable[[Tensor], tuple[Tensor, float]]
SCHEDULE = find(None, operation="screen")
EMBEDDING = "model.embed_tokens.weight"


def exact(x: Tensor) -> tuple[Tensor, float]:
    """Full precision."""
    return x.clone(), 32.0 * x[0].numel()


def signs(x: Tensor) -> tuple[Tensor, float]:
    """One bit an entry and a mean magnitude a tensor."""
    return x.sign() * x.abs().flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1)), x[0].numel()


def largest(x: Tensor, *, density: float) -> tuple[Tensor, float]:
    """The signs of the largest entries, their set at its entropy."""
    rows = x.flatten(1)
    k = max(1, round(density * rows.shape[1]))
    values, indices = rows.abs().topk(k, dim=1)
    kept = rows.gather(1, indices).sign() * values.mean(1, keepdim=True)
    share = k / rows.shape[1]
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share) if share < 1 else 0.0
    return torch.zeros_like(rows).scatter_(1, indices, kept).view_as(x), rows.shape[1] * entropy + k


def one_of(x: Tensor, *, m: int) -> tuple[Tensor, float]:
    """The sign of the largest of each ``m`` consecutive entries."""
    groups = x.reshape(x.shape[0], -1, m)
    values, indices = groups.abs().max(dim=2, keepdim=True)
    kept = groups.gather(2, indices).sign() * values.mean((1, 2), keepdim=True)
    return torch.zeros_like(groups).scatter_(2, indices, kept).view_as(x), groups.shape[1] * (
        math.log2(m) + 1
    )


def row_signs(x: Tensor) -> tuple[Tensor, float]:
    """One bit an entry and a mean magnitude a row."""
    return x.sign() * x.abs().mean(-1, keepdim=True), x[0].numel() + (
        16.0 * x.shape[1] if x.ndim > 2 else 0.0
    )


def in_cosines(x: Tensor, *, density: float) -> tuple[Tensor, float]:
    """The largest coefficients of the orthonormal DCT-II of the whole matrix."""
    left, right = (cosine_basis(size, x.dtype, x.device) for size in x.shape[-2:])
    decoded, bits = largest(left @ x @ right.mT, density=density)
    return left.mT @ decoded @ right, bits


def low_rank_and_largest(x: Tensor, *, rank: int, density: float) -> tuple[Tensor, float]:
    """The leading singular directions, 8 bits a number of their factors, and the largest entries of what is left."""
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    low = u[..., :rank] * values[..., None, :rank] @ v[..., :rank, :]
    rest, bits = largest(x - low, density=density)
    return low + rest, bits + 8.0 * rank * sum(x.shape[-2:])


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train; ``interval`` 0 is dense Muon.

    Args:
        interval, growth: H, and by how much it grows a step.
        coding: of matrices at a synchronization.
        momentum: of the local steps.
        decay: of the feedback.
        outer_lr, outer_momentum: of the shared weights, Nesterov.
        average_momentum: average the replicas' momentum densely at each synchronization; its bits are not counted.
        normalize_rows: NorMuon's mean squares of rows, after the polar factor.
        own_residual: replicas keep what they did not send in their own weights instead of as feedback.
        inner_adamw: AdamW for the matrices too.
        dense_last: the last synchronization is exact.
        rising: the density grows threefold as the rate decays, at its bits.
        delay: steps that replicas go on with before they get the others' changes.
    """

    interval: int
    coding: Coding = signs
    momentum: float = 0.95
    decay: float = 0.9
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    average_momentum: bool = False
    growth: float = 0.0
    normalize_rows: bool = False
    own_residual: bool = False
    inner_adamw: bool = False
    dense_last: bool = False
    rising: bool = False
    delay: int = 0


ONE_BIT = Variant(interval=11, momentum=0.9, decay=0.5, outer_lr=0.9, outer_momentum=0.3)
GROWING = Variant(interval=28, growth=0.0453, momentum=0.9, decay=0.5, outer_lr=0.9, outer_momentum=0.5)
VARIANTS: dict[str, Variant] = {
    "dense-0.95": Variant(interval=0),
    "dense-0.9": Variant(interval=0, momentum=0.9),
    "H5-exact": Variant(interval=5, coding=exact),
    "H5-exact-averaged-momentum": Variant(interval=5, coding=exact, average_momentum=True),
    "H5-signs": Variant(interval=5),
    "H5-signs-0.9": Variant(interval=5, momentum=0.9),
    "H5-top10%": Variant(interval=5, coding=partial(largest, density=0.1)),
    "H5-top10%-averaged-momentum": Variant(
        interval=5, coding=partial(largest, density=0.1), average_momentum=True
    ),
    "H5-top10%-0.9": Variant(interval=5, coding=partial(largest, density=0.1), momentum=0.9),
    "H5-1of8-0.9": Variant(interval=5, coding=partial(one_of, m=8), momentum=0.9),
    "H3-top4%": Variant(interval=3, coding=partial(largest, density=0.04)),
    "H10-signs-0.95": Variant(interval=10),
    "H10-signs": Variant(interval=10, momentum=0.9),
    "H10-signs-d0.7": Variant(interval=10, momentum=0.9, decay=0.7),
    "H10-signs-d0.5": Variant(interval=10, momentum=0.9, decay=0.5),
    "H10-signs-o1.2": Variant(interval=10, momentum=0.9, decay=0.5, outer_lr=1.2),
    "H10-signs-d0-o1.2": Variant(interval=10, momentum=0.9, decay=0.0, outer_lr=1.2),
    "H10-signs-o0.9-m0.3": Variant(interval=10, momentum=0.9, decay=0.5, outer_lr=0.9, outer_momentum=0.3),
    "H50-signs-o1.2": Variant(interval=50, momentum=0.9, decay=0.5, outer_lr=1.2),
    "H50-signs-o0.9-m0.5": Variant(interval=50, momentum=0.9, decay=0.5, outer_lr=0.9, outer_momentum=0.5),
    "H55-signs": Variant(interval=55, momentum=0.9, decay=0.5, outer_lr=0.9, outer_momentum=0.5),
    "H28-growing": Variant(
        interval=28, growth=0.0453, momentum=0.9, decay=0.5, outer_lr=0.9, outer_momentum=0.5
    ),
    "H96-shrinking": Variant(
        interval=96, growth=-0.0453, momentum=0.9, decay=0.5, outer_lr=0.9, outer_momentum=0.5
    ),
    "H50-signs-d0.9-o0.9-m0.5": Variant(interval=50, momentum=0.9, outer_lr=0.9, outer_momentum=0.5),
    "H5-top10%-own-residual": Variant(
        interval=5, coding=partial(largest, density=0.1), momentum=0.9, own_residual=True
    ),
    "H5-top10%-dct": Variant(interval=5, coding=partial(in_cosines, density=0.1), momentum=0.9),
    "H5-top10%-o0.9-m0.5": Variant(
        interval=5, coding=partial(largest, density=0.1), momentum=0.9, outer_lr=0.9, outer_momentum=0.5
    ),
    "H5-top10%-rising": Variant(interval=5, coding=partial(largest, density=0.06), momentum=0.9, rising=True),
    "H5-low-rank-and-top5%": Variant(
        interval=5, coding=partial(low_rank_and_largest, rank=1, density=0.05), momentum=0.9
    ),
    "H11": ONE_BIT,
    "H11-adamw": replace(ONE_BIT, inner_adamw=True),
    "H11-row-scale": replace(ONE_BIT, coding=row_signs),
    "H11-dense-last": replace(ONE_BIT, dense_last=True),
    "H11-own-residual": replace(ONE_BIT, own_residual=True),
    "H11-delay2": replace(ONE_BIT, delay=2),
    "H11-delay5": replace(ONE_BIT, delay=5),
    "H11-normalized-rows": replace(ONE_BIT, normalize_rows=True),
    "H11-m0.8": replace(ONE_BIT, momentum=0.8),
    "dense-0.9-normalized-rows": Variant(interval=0, momentum=0.9, normalize_rows=True),
    "growing": GROWING,
    "growing-exact": replace(GROWING, coding=exact, decay=0.0),
    "growing-normalized-rows": replace(GROWING, normalize_rows=True),
    "growing-m0.95": replace(GROWING, momentum=0.95),
    "growing-m0.8": replace(GROWING, momentum=0.8),
    "growing-d0": replace(GROWING, decay=0.0),
    "growing-om0.65": replace(GROWING, outer_momentum=0.65),
    "growing-from-12": replace(GROWING, interval=12, growth=0.085),
    "growing-top10%": replace(
        GROWING, interval=14, growth=0.0253, coding=partial(largest, density=0.1), decay=0.9
    ),
}


class Replicas:
    """A Llama whose weights carry the replicas as their first dimension."""

    def __init__(self, task: TextTask, *, replicas: int, seed: int) -> None:
        self.task, self.replicas, self.seed = task, replicas, seed
        self.size = MODEL_SIZES[task.settings.model_size]
        model = task.build_model(seed=seed)
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.hidden = [n for n, p in self.start.items() if p.ndim == 2 and n != EMBEDDING]
        length = task.settings.sequence
        rotary: tuple[Tensor, Tensor] = cast(Any, model).model.rotary_emb(
            torch.zeros(1, length, 1), torch.arange(length)[None]
        )
        self.cosines, self.sines = rotary[0][0], rotary[1][0]
        self.compiled = torch.compile(self.loss, dynamic=False)

    def loss(self, weights: Tensors, tokens: Tensor) -> Tensor:
        """Sum over the replicas of each one's mean loss; tokens (replicas, sequences, length + 1)."""
        replicas, sequences, length = tokens.shape[0], tokens.shape[1], tokens.shape[2] - 1
        width, heads = self.size.width, self.size.heads
        table = weights[EMBEDDING]
        offset = torch.arange(replicas)[:, None, None] * table.shape[1]
        x = nn.functional.embedding((tokens[:, :, :-1] + offset).reshape(replicas, -1), table.flatten(0, 1))

        def norm(x: Tensor, gain: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain[:, None]

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * self.cosines[:length] + torch.cat([-second, first], -1) * self.sines[:length]

        for i in range(self.size.depth):
            layer = {n.split(".")[-2]: w for n, w in weights.items() if n.startswith(f"model.layers.{i}.")}
            y = norm(x, layer["input_layernorm"])
            q, k, v = (
                (y @ layer[f"{part}_proj"].mT).view(replicas * sequences, length, heads, -1).transpose(1, 2)
                for part in "qkv"
            )
            mixed = nn.functional.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
            x = x + mixed.transpose(1, 2).reshape(replicas, -1, width) @ layer["o_proj"].mT
            y = norm(x, layer["post_attention_layernorm"])
            x = (
                x
                + (nn.functional.silu(y @ layer["gate_proj"].mT) * (y @ layer["up_proj"].mT))
                @ layer["down_proj"].mT
            )
        logits = norm(x, weights["model.norm.weight"]) @ table.mT
        total = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :, 1:].flatten(), reduction="sum")
        mean: Tensor = total / (sequences * length)
        return mean

    def gradients(self, weights: Tensors, step: int) -> Tensors:
        """Of each replica, on its batch of ``step``."""
        ranks = range(self.replicas)
        batches = [
            self.task.batch(seed=self.seed, step=step, rank=r, world_size=self.replicas) for r in ranks
        ]
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        loss = self.compiled(leaves, torch.stack([b["tokens"] for b in batches]))
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    @torch.no_grad()
    def evaluate(self, weights: Tensors) -> float:
        """Evaluation loss of shared weights."""
        model = self.task.build_model(seed=self.seed)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        total, terms = self.task.evaluate(model, rank=0, world_size=1)
        return total / terms


class Muon:
    """Muon and AdamW on weights whose first dimension is the replicas', with the library's defaults."""

    def __init__(self, weights: Tensors, hidden: list[str], *, variant: Variant) -> None:
        self.hidden = [] if variant.inner_adamw else hidden
        self.beta, self.steps, self.normalize_rows = variant.momentum, 0, variant.normalize_rows
        hidden = self.hidden
        self.mean = {n: torch.zeros_like(w) for n, w in weights.items()}
        self.rows: Tensors = {}
        self.square = {n: torch.zeros_like(w) for n, w in weights.items() if n not in hidden}

    def step(self, weights: Tensors, gradients: Tensors, *, lr: float) -> None:
        """One step of all replicas."""
        self.steps += 1
        for name, weight in weights.items():
            g, mean = gradients[name], self.mean[name]
            if name in self.hidden:
                mean.lerp_(g, 1 - self.beta)
                update = polar(g.lerp(mean, self.beta), method="newton_schulz", schedule=SCHEDULE)
                if self.normalize_rows:
                    update = self._rows_normalized(name, update)
                update = update * shape_scale("rms", *weight.shape[-2:])
            else:
                mean.lerp_(g, 0.1)
                square = self.square[name].mul_(0.95).addcmul_(g, g, value=0.05)
                root = (square / (1 - 0.95**self.steps)).sqrt().add_(1e-8)
                update = mean / (1 - 0.9**self.steps) / root
            if weight.ndim > 2:
                weight.mul_(1 - lr * 0.01)
            weight.sub_(update, alpha=lr)

    def _rows_normalized(self, name: str, update: Tensor) -> Tensor:
        energy = update.square().mean(-1, keepdim=True)
        rows = self.rows.setdefault(name, torch.zeros_like(energy)).lerp_(energy, 0.05)
        made = update / (rows / (1 - 0.95**self.steps)).sqrt().add_(1e-8)
        lengths = [m.flatten(1).norm(dim=1)[:, None, None] for m in (update, made)]
        rescaled: Tensor = made * (lengths[0] / lengths[1])
        return rescaled


def train(
    task: TextTask, variant: Variant, *, lr: float, steps: int, seed: int, replicas: int
) -> tuple[float, float]:
    """Evaluation loss after the last step, and bits per parameter and step."""
    model = Replicas(task, replicas=replicas, seed=seed)
    copies = replicas if variant.interval else 1
    shared = {n: w.clone() for n, w in model.start.items()}
    weights = {n: w.repeat(copies, *[1] * w.ndim) for n, w in shared.items()}
    inner = Muon(weights, model.hidden, variant=variant)
    kept = {n: torch.zeros_like(w) for n, w in weights.items()}
    speed = {n: torch.zeros_like(w) for n, w in shared.items()}
    bits, last, arriving = 0.0, 0, 0
    moves: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(1, steps + 1):
        factor = lr_factor(step, steps=steps, warmup_steps=max(steps // 20, 1), kind="cosine", floor=0.1)
        all_weights = {n: w.expand(replicas, *w.shape[1:]) for n, w in weights.items()}
        gradients = model.gradients(all_weights, step)
        if not variant.interval:
            gradients = {n: g.mean(0, keepdim=True) for n, g in gradients.items()}
        inner.step(weights, gradients, lr=lr * factor)
        end = step == steps
        if variant.interval and (step - last >= variant.interval + variant.growth * step or end):
            last, arriving = step, steps if end else step + variant.delay
            density = 1 + 2 * step / steps if variant.rising else 1.0
            for name, anchor in shared.items():
                change = anchor - weights[name]
                signal = change if variant.own_residual else kept[name].mul_(variant.decay).add_(change)
                coding = variant.coding if anchor.ndim > 1 else signs
                if variant.rising and isinstance(coding, partial):
                    coding = partial(coding.func, density=coding.keywords["density"] * density)
                decoded, spent = exact(signal) if end and variant.dense_last else coding(signal)
                bits += spent
                if not variant.own_residual:
                    kept[name].sub_(decoded)
                moves[name] = decoded, weights[name].clone()
        if variant.interval and step == arriving:
            for name, anchor in shared.items():
                decoded, at = moves[name]
                move, before = decoded.mean(0), anchor.clone()
                speed[name].mul_(variant.outer_momentum).add_(move)
                anchor.sub_(move + variant.outer_momentum * speed[name], alpha=variant.outer_lr)
                # What a replica has moved since it sent stays on top of the shared weights.
                weights[name].add_(anchor - before + decoded if variant.own_residual else anchor - at)
            if variant.average_momentum:
                for name in model.hidden:
                    inner.mean[name].copy_(inner.mean[name].mean(0).expand_as(inner.mean[name]))
    final = shared if variant.interval else {n: w[0] for n, w in weights.items()}
    parameters = sum(w.numel() for w in shared.values())
    return model.evaluate(final), bits / parameters / steps if variant.interval else 32.0


def main() -> None:
    """A line a variant, rate and seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model-size", choices=list(MODEL_SIZES), default="pico")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = TextTask(TextSettings(model_size=args.model_size, batch=args.batch))
    for name in args.only:
        for lr in args.lr:
            for seed in args.seeds:
                start_s = time.perf_counter()
                loss, bits = train(
                    task, VARIANTS[name], lr=lr, steps=args.steps, seed=seed, replicas=args.replicas
                )
                took_s = time.perf_counter() - start_s
                print(
                    f"{name:28} lr={lr:g} seed={seed} loss {loss:.4f} at {bits:.4g} bit ({took_s:.0f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
