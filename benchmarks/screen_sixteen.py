"""Screens forms of local Muon at many replicas: all replicas and all matrices of a shape in one batch, bits by formula.

Products are bfloat16, so it is for finding out what is worth a real comparison: what it prints is no evidence. A line of the
plan is a run, `name=value` pairs of the fields of Run; a run that the record holds already is not run again, and the plan is
read again after each run, so lines may be added meanwhile.

python -m benchmarks.screen_sixteen --plan plan.txt --out runs/sixteen.jsonl
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from benchmarks.screen_local_steps import EMBEDDING, Replicas, Tensors
from torch import Tensor, nn

from muonwire.polar.schedules import find
from muonwire.tasks import TextSettings, TextTask
from muonwire.train.schedule import lr_factor

SCHEDULE = find(None, operation="screen")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; ``interval`` 0 is dense Muon.

    Args:
        interval, growth: H, and by how much it grows a step.
        lr, momentum: of the local steps.
        nesterov: 1, or 0: whether local steps look ahead by the gradient.
        decay: of the feedback.
        outer_lr, outer_momentum: of the shared weights, Nesterov.
        outer: "momentum", or "polar": matrices move by the polar factor of the momentum of mean changes, as far as local steps did.
        lengthen: a; the mean is multiplied by g^a, g = mean norm of what replicas sent / norm of its mean.
        by: what one g is for: "tensor", "row", "column", "entry" or "direction" (singular directions of the mean).
        bits: "sign", "exact", or "tail": the signs of the largest entries of each matrix, whose places are entropy-coded.
        share: of the entries that "tail" sends.
        surprise: β of a running mean of the squares of each entry of a replica's signal; "tail" takes those that are largest beside
            its root. 0: those that are largest.
        level: β of such a mean, too; what a replica sends of matrices is divided by its root first, without feedback. 0: it is as
            it is.
        rotate: 1: matrices are sent as seen in random orthonormal bases of rows and columns, new ones each time. 0: as they are.
        parts: each replica sends one of so many parts of the entries at a synchronization, in turns.
        unsent: share of the parts that are not sent that is kept for the next synchronization.
        consensus: share of what a replica's signal has more than the mean move, in every entry, that is kept for the next
            synchronization, in place of ``decay`` and ``unsent``.
        over: what the mean of parts divides by: "senders" or "replicas".
        fragments: tensors synchronize at so many different times.
        share_momentum: what of the momentum replicas average at a synchronization: "", "exact", "sign", or "entry": signs, times a
            running mean of own magnitudes, entry by entry.
        momentum_parts: each replica sends the momentum of one of so many parts of the entries, in turns.
        momentum_share: how far replicas' own momentum moves to the mean.
        control: what moves replicas' own momentum by (mean of all − own): "momentum", signs of the momentum; "factor", signs of its
            polar factor, times own magnitudes; "change", the changes that are sent anyway, times own magnitudes.
        table: how the embedding is sent, always whole: "exact", or "row", signs with a scale a row; else as the matrices are.
        rebuild: how far replicas' own momentum moves to the mean change times its own magnitudes.
        ahead: multiple of the last shared change that local steps add, spread over H steps.
        correct: multiple of what the last shared change has more than the own one, that local steps add, spread over H steps; it is
            not sent.
        until: step to stop at, of a schedule of ``steps``; 0 is the last.
        smooth: weight, per synchronization, of older shared weights in an average that is evaluated, too.
    """

    interval: int = 11
    growth: float = 0.0
    lr: float = 0.02
    momentum: float = 0.9
    nesterov: float = 1.0
    decay: float = 0.5
    outer_lr: float = 0.9
    outer_momentum: float = 0.3
    outer: str = "momentum"
    lengthen: float = 0.0
    by: str = "tensor"
    bits: str = "sign"
    share: float = 0.03
    surprise: float = 0.0
    level: float = 0.0
    rotate: int = 0
    parts: int = 1
    unsent: float = 0.0
    consensus: float = 0.0
    over: str = "senders"
    fragments: int = 1
    share_momentum: str = ""
    momentum_share: float = 1.0
    momentum_parts: int = 1
    control: str = ""
    table: str = ""
    rebuild: float = 0.0
    ahead: float = 0.0
    correct: float = 0.0
    smooth: float = 0.5
    replicas: int = 16
    steps: int = 500
    until: int = 0
    seed: int = 0
    batch: int = 8
    model_size: str = "pico"

    @classmethod
    def parse(cls, line: str) -> "Run":
        """Of ``name=value`` pairs; a number takes the type of the field's default."""
        types: dict[str, Any] = {f.name: type(f.default) for f in fields(cls)}
        pairs = (pair.split("=") for pair in line.split())
        return cls(**{name: types[name](value) for name, value in pairs})

    def __str__(self) -> str:
        return " ".join(
            f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}"
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default
        )


def orthogonal(x: Tensor) -> Tensor:
    """Polar factors of (..., m, n), m ≤ n, by the plain iteration in bfloat16."""
    y = (x / (x.flatten(-2).norm(dim=-1)[..., None, None] * SCALE + 1e-12)).bfloat16().flatten(0, -3)
    for a, b, c in COEFFICIENTS:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    factors: Tensor = y.float().view_as(x)
    return factors


class Stacked(Replicas):  # type: ignore[misc]
    """The replicas, whose matrices of one shape lie in one tensor (replicas, matrices, m, n) with m ≤ n.

    Stacks are "square" and "wide" with the number of their fragment, "table" (the embedding) and "gain" (of norms).
    """

    def __init__(self, task: TextTask, *, replicas: int, seed: int, fragments: int) -> None:
        super().__init__(task, replicas=replicas, seed=seed)
        self.places: dict[str, tuple[str, int, bool]] = {}
        stacks: dict[str, list[Tensor]] = {}
        count = 0
        for name, p in self.start.items():
            tall = p.ndim == 2 and p.shape[0] > p.shape[1] and name != EMBEDDING
            kind = "table" if name == EMBEDDING else "gain" if p.ndim == 1 else "wide"
            if kind == "wide":
                kind = f"{'square' if p.shape[0] == p.shape[1] else 'wide'}{count % fragments}"
                count += 1
            stack = stacks.setdefault(kind, [])
            self.places[name] = kind, len(stack), tall
            stack.append(p.mT if tall else p)
        self.first = {kind: torch.stack(stack) for kind, stack in stacks.items()}
        self.scales = {
            kind: torch.tensor(
                [
                    0.2 * math.sqrt(max(p.shape))
                    for name, p in self.start.items()
                    if self.places[name][0] == kind
                ]
            )
            for kind in self.first
            if kind not in ("table", "gain")
        }
        self.compiled = torch.compile(self.stacked_loss, dynamic=False)

    def by_name(self, stacks: Tensors) -> Tensors:
        """The parameters as the model has them; stacks with or without replicas before."""
        made = {}
        for name, (kind, index, tall) in self.places.items():
            stack = stacks[kind]
            entry = stack.select(-2 if kind == "gain" else -3, index)
            made[name] = entry.mT if tall else entry
        return made

    def stacked_loss(self, stacks: Tensors, tokens: Tensor) -> Tensor:
        """Sum over the replicas of each one's mean loss; tokens (replicas, sequences, length + 1)."""
        weights = self.by_name(stacks)
        replicas, sequences, length = tokens.shape[0], tokens.shape[1], tokens.shape[2] - 1
        width, heads = self.size.width, self.size.heads
        table = weights[EMBEDDING]
        offset = torch.arange(replicas)[:, None, None] * table.shape[1]
        x = nn.functional.embedding((tokens[:, :, :-1] + offset).reshape(replicas, -1), table.flatten(0, 1))
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

        def norm(x: Tensor, gain: Tensor) -> Tensor:
            return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain[:, None]).bfloat16()

        def turned(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, dim=-1)
            turned: Tensor = x * self.cosines[:length] + torch.cat([-second, first], -1) * self.sines[:length]
            return turned.bfloat16().flatten(0, 1)

        for i in range(self.size.depth):
            layer = {
                n.split(".")[-2]: w if "norm" in n else w.bfloat16()
                for n, w in weights.items()
                if n.startswith(f"model.layers.{i}.")
            }
            y = norm(x, layer["input_layernorm"])
            q, k, v = (
                (y @ layer[f"{part}_proj"].mT).view(replicas * sequences, length, heads, -1).transpose(1, 2)
                for part in "qkv"
            )
            scores = (turned(q) @ turned(k).mT).float() / math.sqrt(width // heads)
            mixed = scores.masked_fill(hidden, -math.inf).softmax(-1).bfloat16() @ v.flatten(0, 1)
            mixed = mixed.view(replicas * sequences, heads, length, -1).transpose(1, 2)
            x = x + (mixed.reshape(replicas, -1, width) @ layer["o_proj"].mT).float()
            y = norm(x, layer["post_attention_layernorm"])
            gate, up = (y @ layer["gate_proj"].mT).float(), (y @ layer["up_proj"].mT).float()
            x = x + ((nn.functional.silu(gate) * up).bfloat16() @ layer["down_proj"].mT).float()
        logits = (norm(x, weights["model.norm.weight"]) @ table.bfloat16().mT).float()
        total = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :, 1:].flatten(), reduction="sum")
        mean: Tensor = total / (sequences * length)
        return mean


# A polynomial a x + b x³ + c x⁵ a step; the first also divides what it gets by a number a little above its norm.
COEFFICIENTS, SCALE = [(float(a), float(b), float(c)) for a, b, c in SCHEDULE.coefficients], 1.01

SIZE_BETA = 0.98


class Muon:
    """Muon and AdamW on stacks, with the library's defaults."""

    def __init__(self, weights: Tensors, scales: Tensors, *, momentum: float, nesterov: bool) -> None:
        self.scales, self.beta, self.steps, self.nesterov = scales, momentum, 0, nesterov
        self.mean = {n: torch.zeros_like(w) for n, w in weights.items()}
        self.square = {n: torch.zeros_like(w) for n, w in weights.items() if n not in scales}
        # Running mean of the magnitudes of the momentum's entries.
        self.size = {n: torch.zeros_like(w) for n, w in weights.items() if n in scales}

    @torch.no_grad()
    def step(self, weights: Tensors, gradients: Tensors, *, lr: float) -> None:
        """One step of all replicas."""
        self.steps += 1
        for name, weight in weights.items():
            g, mean = gradients[name], self.mean[name]
            if name in self.scales:
                mean.lerp_(g, 1 - self.beta)
                self.size[name].lerp_(mean.abs(), 1 - SIZE_BETA)
                update = orthogonal(g.lerp(mean, self.beta) if self.nesterov else mean).mul_(
                    self.scales[name][:, None, None]
                )
            else:
                mean.lerp_(g, 0.1)
                square = self.square[name].mul_(0.95).addcmul_(g, g, value=0.05)
                root = (square / (1 - 0.95**self.steps)).sqrt_().add_(1e-8)
                update = (mean / (1 - 0.9**self.steps)).div_(root)
            if name != "gain":
                weight.mul_(1 - lr * 0.01)
            weight.sub_(update, alpha=lr)


def signs(x: Tensor, mask: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """The sign of every entry, or of those of the mask, with one mean magnitude a tensor."""
    size = x.abs()
    if mask is None:
        return x.sign() * size.mean(dims, keepdim=True)
    return (
        x.sign() * mask * ((size * mask).sum(dims, keepdim=True) / mask.expand_as(x).sum(dims, keepdim=True))
    )


def tail(x: Tensor, share: float) -> Tensor:
    """Whether an entry is among the largest of its matrix, as 0 or 1."""
    size = x.abs().flatten(-2)
    count = max(round(share * size.shape[-1]), 1)
    least = size.kthvalue(size.shape[-1] - count + 1, dim=-1).values[..., None, None]
    return (x.abs() >= least).float()


def cosine(changes: Tensor) -> float:
    """Of two replicas' changes, (replicas, …), the mean: inner products of all pairs over mean squares."""
    replicas, own = len(changes), changes.square().sum() / len(changes)
    pairs = (changes.mean(0).square().sum() - own / replicas) / (1 - 1 / replicas)
    return float(pairs / own.clamp(min=1e-20))


def entropy(share: float) -> float:
    """Bits an entry of a mask with a share of ones."""
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


class Shared:
    """The shared weights, and how they move."""

    def __init__(self, run: Run, model: Stacked) -> None:
        self.run, self.model = run, model
        self.weights = {n: w.clone() for n, w in model.first.items()}
        self.speed = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.moved = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.kept = {n: torch.zeros(run.replicas, *w.shape) for n, w in self.weights.items()}
        # What the last shared change was more than the own one, and what multiple of it local steps have added since.
        self.off, self.passed = {n: torch.zeros_like(k) for n, k in self.kept.items()}, 0.0
        self.average = {n: w.clone() for n, w in self.weights.items()}
        # By option and stack, running means of the squares of what replicas should send.
        self.usual: dict[tuple[str, str], Tensor] = {}
        self.bits, self.round, self.gain = 0.0, 0, 1.0
        # Of each synchronization, the mean cosine of two replicas' changes of the matrices.
        self.cosines: list[float] = []
        generator = torch.Generator().manual_seed(1)
        most = run.parts * run.momentum_parts
        self.classes = {n: torch.randint(most, w.shape, generator=generator) for n, w in self.weights.items()}

    def mask(self, name: str, parts: int) -> Tensor | None:
        """(replicas, matrices, m, n): what each replica sends now."""
        if parts == 1 or name == "gain":
            return None
        turns = (torch.arange(self.run.replicas) + self.round) % parts
        return (self.classes[name][None] % parts == turns.view(-1, 1, 1, 1)).float()

    def bases(self, name: str, inner: Muon) -> tuple[Tensor, Tensor] | None:
        """Of the rows and the columns of a stack's matrices; none where they are sent as they are."""
        if not self.run.rotate or name not in inner.scales:
            return None
        generator = torch.Generator().manual_seed(self.round)
        m, n = self.weights[name].shape[-2:]
        rows, columns = (torch.linalg.qr(torch.randn(k, k, generator=generator)).Q for k in (m, n))
        return rows, columns

    def relative(self, signal: Tensor, name: str, option: str) -> Tensor:
        """The signal beside what is usual of each of its entries, by the β that the option has, where it is not 0."""
        beta: float = getattr(self.run, option)
        if not beta:
            return signal
        usual = self.usual.setdefault((option, name), torch.zeros_like(signal))
        usual.lerp_(signal.square(), 1 - beta)
        return signal / (usual / (1 - beta ** (self.round + 1))).sqrt().clamp(min=1e-12)

    def lengthened(self, decoded: Tensor, mean: Tensor, name: str, *, whole: Tensor | None) -> Tensor:
        """The mean, times g^a; of a tail, as long as the ``whole`` signal is."""
        run = self.run
        if not run.lengthen or name == "gain":
            return mean
        if run.by == "direction" and name != "table":
            u, values, v = torch.linalg.svd(mean, full_matrices=False)
            across = (u.mT[None] @ decoded).square().sum(-1).mean(0).sqrt()
            gain = (across / values.clamp(min=1e-12)).clamp(max=math.sqrt(run.replicas)) ** run.lengthen
            made: Tensor = (u * (values * gain)[..., None, :]) @ v
            return made
        dims = {"tensor": (-2, -1), "direction": (-2, -1), "row": (-1,), "column": (-2,), "entry": ()}[run.by]
        if whole is not None:
            sent, met = whole.square().mean((0, -2, -1)), mean.square().mean((-2, -1))
            grown: Tensor = mean * (sent / met.clamp(min=1e-20)).sqrt()[:, None, None] ** run.lengthen
            return grown
        both = decoded.square().mean(0), mean.square()
        sent, met = (x.mean(dims, keepdim=True) if dims else x for x in both)
        share = run.parts if run.parts > 1 and run.over == "senders" else 1
        gain = (sent * share / met.clamp(min=1e-20)).sqrt().clamp(max=math.sqrt(run.replicas))
        self.gain = float(gain.mean())
        return mean * gain**run.lengthen

    @torch.no_grad()
    def synchronize(self, local: Tensors, inner: Muon, names: list[str], *, path: float) -> None:
        """Move the shared weights by what replicas send, and the replicas to them.

        Args:
            local: the replicas' weights.
            inner: their optimizer.
            names: stacks or, with fragments, those of this one.
            path: sum of the rates since the last synchronization.
        """
        run = self.run
        for name in names:
            anchor = self.weights[name]
            dims = (-1,) if name == "gain" else (-2, -1)
            change = anchor - local[name]
            if run.correct:
                change -= self.off[name] * self.passed
            if name in inner.scales:
                self.cosines.append(cosine(change))
            signal = self.kept[name].add_(change)
            if run.level and name in inner.scales:
                length = signal.norm(dim=(-2, -1), keepdim=True)
                signal = self.relative(signal, name, "level")
                signal *= length / signal.norm(dim=(-2, -1), keepdim=True)
            if bases := self.bases(name, inner):
                signal = bases[0].mT @ signal @ bases[1]
            whole = run.table if name == "table" else ""
            is_tail = run.bits == "tail" and name != "gain" and not (name == "table" and run.parts > 1)
            mask = None if whole or is_tail else self.mask(name, run.parts)
            is_exact = "exact" in (run.bits, whole)
            if is_exact:
                decoded = signal.clone() if mask is None else signal * mask
            elif is_tail:
                decoded = signs(signal, tail(self.relative(signal, name, "surprise"), run.share), dims)
                self.bits += anchor.numel() * (entropy(run.share) + run.share - 1)
            else:
                decoded = signs(signal, mask, (-1,) if whole == "row" else dims)
            self.bits += anchor.numel() * (32 if is_exact else 1) / (1 if mask is None else run.parts)
            if whole == "row":
                self.bits += 16 * anchor.shape[-2]
            senders = 1 if mask is None or run.over == "replicas" else run.parts
            mean = decoded.mean(0) * senders
            whole_signal = signal.clone() if is_tail else None
            rest = (signal - decoded).mul_(run.decay) if mask is None else None
            if mask is not None:
                rest = (signal - decoded) * (mask * run.decay + (1 - mask) * run.unsent)
            if run.consensus:
                rest = (signal - mean).mul_(run.consensus)
            assert rest is not None
            self.kept[name] = bases[0] @ rest @ bases[1].mT if bases else rest
            if run.rebuild and name in inner.scales:
                self.rebuild(mean, inner, name, path=path)
            if run.control and name in inner.scales:
                self.control(mean - signs(change, None, dims), inner, name, path=path)
            move = self.lengthened(decoded, mean, name, whole=whole_signal)
            if bases:
                move = bases[0] @ move @ bases[1].mT
            self.speed[name].mul_(run.outer_momentum).add_(move)
            step = (move + run.outer_momentum * self.speed[name]).mul_(run.outer_lr)
            if run.outer == "polar" and name in inner.scales:
                step = orthogonal(step) * (run.outer_lr * path * inner.scales[name][:, None, None])
            anchor.sub_(step)
            self.moved[name] = step
            if run.correct:
                self.off[name] = step - change
            local[name].copy_(anchor.expand_as(local[name]))
            if run.share_momentum and name in inner.scales:
                self.share(inner, name)
            self.average[name].lerp_(anchor, 1 - run.smooth)
        self.round, self.passed = self.round + 1, 0.0

    def share(self, inner: Muon, name: str) -> None:
        """Move own momentum to the mean of what replicas send of theirs."""
        run, held = self.run, inner.mean[name]
        mask = self.mask(name, run.momentum_parts)
        whole = torch.ones(1) if mask is None else mask
        if run.share_momentum == "exact":
            mean = (held * whole).sum(0) / whole.expand_as(held).sum(0)
        elif run.share_momentum == "sign":
            mean = signs(held, mask, (-2, -1)).sum(0) / whole.expand_as(held).sum(0)
        else:
            mean = (
                (held.sign() * whole).sum(0)
                / whole.expand_as(held).sum(0)
                * (inner.size[name] / (1 - SIZE_BETA**inner.steps))
            )
        self.bits += held[0].numel() * (32 if run.share_momentum == "exact" else 1) / run.momentum_parts
        held.lerp_(mean.expand_as(held), run.momentum_share)

    def control(self, off: Tensor, inner: Muon, name: str, *, path: float) -> None:
        """Move own momentum by what it is off the mean, as far as signs tell; ``off`` is that of the changes that were sent."""
        held = inner.mean[name]
        factor = orthogonal(held)
        if self.run.control == "change":
            held.add_((held @ factor.mT) @ (off / (path * inner.scales[name][:, None, None])))
            return
        sent = signs(held if self.run.control == "momentum" else factor, None, (-2, -1))
        off = sent.mean(0) - sent
        held.add_(off if self.run.control == "momentum" else (held @ factor.mT) @ off)
        self.bits += sent[0].numel()

    def rebuild(self, mean: Tensor, inner: Muon, name: str, *, path: float) -> None:
        """Move own momentum to S U: U the mean polar factor that the mean change stands for, S own magnitudes."""
        held = inner.mean[name]
        magnitudes = held @ orthogonal(held).mT
        factor = mean / (path * inner.scales[name][:, None, None])
        made = magnitudes @ factor.expand_as(held)
        held.lerp_(made, self.run.rebuild)


def train(task: TextTask, model: Stacked, run: Run, pause: Path | None) -> dict[str, Any]:
    """Evaluation losses, and bits per parameter and step."""
    copies = run.replicas if run.interval else 1
    shared = Shared(run, model)
    local = {n: w.repeat(copies, *[1] * w.ndim) for n, w in shared.weights.items()}
    inner = Muon(local, model.scales, momentum=run.momentum, nesterov=bool(run.nesterov))
    groups = split(model, run.fragments)
    last, paths = [0] * len(groups), [0.0] * len(groups)
    curve: dict[int, list[float]] = {}

    def loss(stacks: Tensors) -> float:
        return round(float(model.evaluate(model.by_name(stacks))), 4)

    for step in range(1, (run.until or run.steps) + 1):
        while pause and pause.exists():
            time.sleep(1)
        factor = lr_factor(
            step, steps=run.steps, warmup_steps=max(run.steps // 20, 1), kind="cosine", floor=0.1
        )
        everywhere = {n: w.expand(run.replicas, *w.shape[1:]) for n, w in local.items()}
        gradients = model.gradients(everywhere, step)
        if not run.interval:
            gradients = {n: g.mean(0, keepdim=True) for n, g in gradients.items()}
        inner.step(local, gradients, lr=run.lr * factor)
        if run.correct:
            shared.passed += run.correct / run.interval
            for n, off in shared.off.items():
                local[n].sub_(off, alpha=run.correct / run.interval)
        end = step == run.steps
        length = run.interval + run.growth * step
        for i, group in enumerate(groups if run.interval else []):
            paths[i] += run.lr * factor
            first = not last[i] and step >= length * (i + 1) / len(groups)
            if end or (last[i] and step - last[i] >= length) or first:
                shared.synchronize(local, inner, group, path=paths[i])
                last[i], paths[i] = step, 0.0
        if run.ahead:
            for n, moved in shared.moved.items():
                local[n].sub_(moved, alpha=run.ahead / length)
        if step in (run.steps // 2, run.steps * 3 // 4):
            curve[step] = [loss(now(shared, local)), loss(shared.average)]
    parameters = sum(w.numel() for w in shared.weights.values())
    return {
        "loss": loss(now(shared, local)),
        "smoothed": loss(shared.average) if run.interval else None,
        "curve": curve,
        "bits_sent": round(shared.bits / parameters / (run.until or run.steps), 4) if run.interval else 32.0,
        "gain": round(shared.gain, 3),
        "cosine": round(fmean(shared.cosines), 4) if shared.cosines else None,
    }


def now(shared: Shared, local: Tensors) -> Tensors:
    """The weights that count."""
    return shared.weights if shared.run.interval else {n: w[0] for n, w in local.items()}


def split(model: Stacked, fragments: int) -> list[list[str]]:
    """The stacks by fragment."""
    groups = [[n for n in model.first if n.endswith(str(i))] for i in range(fragments)]
    groups[-1] += ["table", "gain"]
    return groups


def planned(plan: Path) -> Iterator[Run]:
    """The runs of the plan, in its order."""
    for line in plan.read_text().splitlines():
        text = line.split("#")[0].strip()
        if text:
            yield Run.parse(text)


def main() -> None:
    """A line a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pause", type=Path, help="wait while this file exists")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models: dict[tuple[Any, ...], Stacked] = {}

    def done() -> set[str]:
        lines = args.out.read_text().splitlines() if args.out.exists() else []
        return {json.loads(line)["run"] for line in lines}

    while left := [run for run in planned(args.plan) if str(run) not in done()]:
        run = left[0]
        key = (run.model_size, run.batch, run.replicas, run.fragments)
        task = TextTask(TextSettings(model_size=run.model_size, batch=run.batch))
        model = models.get(key)
        if model is None or model.seed != run.seed:
            compiled = model.compiled if model else None
            model = Stacked(task, replicas=run.replicas, seed=run.seed, fragments=run.fragments)
            model.compiled = compiled or model.compiled
            models[key] = model
        start_s = time.process_time()
        result = train(task, model, run, args.pause)
        record = {"run": str(run), **result, "cpu_s": round(time.process_time() - start_s, 1)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps({**record, "settings": asdict(run)}) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
