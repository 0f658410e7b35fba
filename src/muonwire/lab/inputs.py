"""Real matrices that claims are measured on: made once, kept in the lab's output, shared by all claims."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.lab import fingerprints, training
from muonwire.lab.vision_training import tune
from muonwire.spectra.models import PACKAGED, open_model
from muonwire.spectra.weights import weights_of
from muonwire.tasks.models import build_llama
from muonwire.tasks.text import TextSettings, TextTask, read_text

MATRICES = "matrices.safetensors"
ABOUT = "about.json"
BETA = 0.95
# Batches whose gradients are kept apart, as replicas have them.
NUM_REPLICAS = 8


@dataclass(frozen=True, kw_only=True)
class Input:
    """Something that claims read.

    Args:
        name: of its folder.
        about: what it is, for the page; with ``of_model``, {model} stands for the model's name.
        make: fills a folder, small where it is told to be quick; with ``of_model``, from a pretrained model of that name.
        made_with: what ``about.json`` must hold for the folder to count, quick or not. Default: nothing in particular.
        of_model: whether it is made from a pretrained model that the user may choose.
    """

    name: str
    about: str
    make: Callable[..., None]
    made_with: Callable[[bool], dict[str, object]] = lambda quick: {}
    of_model: bool = False

    def folder(self, out: Path, *, quick: bool) -> Path:
        """Where it lies in a lab's output."""
        return out / "inputs" / (f"{self.name}-quick" if quick else self.name)

    def check_model(self, out: Path, *, quick: bool, model: str) -> None:
        """Raise UsageError where it was made from another model, which other measurements in ``out`` rest on."""
        folder = self.folder(out, quick=quick)
        kept = self._kept(folder)
        if kept is not None and self.of_model and not quick and kept.get("of", PACKAGED) != model:
            raise UsageError(
                f"lab: {folder} was made from {kept.get('of', PACKAGED)}, not from {model}; give the measurements of another "
                "model a folder of their own with --out"
            )

    def prepare(self, out: Path, *, quick: bool, model: str = PACKAGED) -> Path:
        """Make it unless it is there, complete and made with what it is made with now.

        Raises:
            UsageError: see ``check_model``.
        """
        self.check_model(out, quick=quick, model=model)
        folder = self.folder(out, quick=quick)
        kept = self._kept(folder)
        if kept is None or not self.made_with(quick).items() <= kept.items():
            folder.mkdir(parents=True, exist_ok=True)
            self.make(folder, quick, *([model] if self.of_model else []))
        return folder

    def told(self, out: Path, *, quick: bool) -> str:
        """What it is, with the name of the model that it was made from."""
        kept = self._kept(self.folder(out, quick=quick)) or {}
        return self.about.format(model=kept.get("model", PACKAGED)) if self.of_model else self.about

    @staticmethod
    def _kept(folder: Path) -> dict[str, Any] | None:
        path = folder / ABOUT
        return json.loads(path.read_text()) if path.exists() else None


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One real matrix.

    Args:
        point: when it was taken, such as "step 200", or "pretrained".
        kind: "gradient", "momentum" (β = 0.95), "change" of the weight over ten steps, or "weight".
        layer: name of the parameter.
        replica: whose batch the gradient is of; None for what all batches made together.
        matrix: (m, n), float32.
    """

    point: str
    kind: str
    layer: str
    replica: int | None
    matrix: Tensor


def captured(
    folder: Path, *, kind: str | None = None, point: str | None = None, replicas: bool = False
) -> Iterator[Captured]:
    """The matrices of an input.

    Args:
        folder: of the input.
        kind: only these. Default: all.
        point: only of this point. Default: all.
        replicas: give the gradients of single replicas' batches instead of what all batches made together.

    Raises:
        UsageError: there are none such.
    """
    found = False
    for name, matrix in sorted(load_file(folder / MATRICES).items()):
        at, what, layer, replica = name.split("|")
        if kind not in (None, what) or point not in (None, at) or replicas != (replica != ""):
            continue
        found = True
        yield Captured(
            point=at, kind=what, layer=layer, replica=int(replica) if replica else None, matrix=matrix.float()
        )
    if not found:
        raise UsageError(f"input: {folder} holds no matrices of kind {kind} at {point}")


def key(point: str, kind: str, layer: str, replica: int | None = None) -> str:
    """The name of a matrix in the file."""
    return f"{point}|{kind}|{layer}|{'' if replica is None else replica}"


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices that Muon is for, by their short names."""
    return {
        _short(name): p
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "head" not in name
    }


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def write(folder: Path, matrices: dict[str, Tensor], about: dict[str, object]) -> None:
    """Write matrices, in bfloat16 as gradients are computed, and what they are."""
    save_file(
        {name: t.to(torch.bfloat16).cpu().contiguous() for name, t in matrices.items()}, folder / MATRICES
    )
    (folder / ABOUT).write_text(json.dumps(about, indent=1))


def _text_training(folder: Path, quick: bool) -> None:
    size, points, every = ("pico", (1, 4), 2) if quick else ("nano", (1, 50, 200, 600), 10)
    task = TextTask(TextSettings(model_size=size, sequence=64, batch=8))
    model = task.build_model(seed=0)
    optimizer = recipes.build("muon", model, lr=0.01)
    hidden = hidden_matrices(model)
    momentum = {name: torch.zeros_like(p) for name, p in hidden.items()}
    matrices: dict[str, Tensor] = {}
    for step in range(1, max(points) + every):
        total = {name: torch.zeros_like(p) for name, p in hidden.items()}
        for replica in range(NUM_REPLICAS):
            batch = task.batch(seed=0, step=step, rank=replica, world_size=NUM_REPLICAS)
            before = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in hidden.items()
            }
            (task.loss(model, batch) / NUM_REPLICAS).backward()  # type: ignore[no-untyped-call]
            for name, p in hidden.items():
                assert p.grad is not None
                mine = p.grad - before[name]
                total[name] += mine
                if step in points:
                    matrices[key(f"step {step}", "gradient", name, replica)] = mine * NUM_REPLICAS
        for name in hidden:
            momentum[name].lerp_(total[name], 1 - BETA)
        if step in points:
            for name, p in hidden.items():
                matrices[key(f"step {step}", "gradient", name)] = total[name]
                matrices[key(f"step {step}", "momentum", name)] = momentum[name].clone()
                matrices[key(f"step {step}", "weight", name)] = p.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        taken = f"step {step - every + 1}"
        if step - every + 1 in points:
            for name, p in hidden.items():
                matrices[key(taken, "change", name)] = matrices[key(taken, "weight", name)] - p.detach()
    write(folder, matrices, {"model": size, "steps": list(points), "recipe": "muon", "lr": 0.01, "seed": 0})


def _language_model(folder: Path, quick: bool, chosen: str) -> None:
    if quick:
        name, batches, window = "untrained", 1, (2, 32)
        model: nn.Module = build_llama("pico", vocabulary=256, sequence=32, seed=1)
        encoded = list(read_text(())[:100_000])
    else:
        opened = open_model(chosen, dtype=torch.float32)
        if opened.tokens is None:
            raise UsageError(
                f"lab: {chosen} has no tokenizer, so that it has no gradients on a text; take another model"
            )
        model = opened.model
        longest = getattr(model.config, "max_position_embeddings", None) or 256
        name, batches, window = opened.gguf or opened.label, 8, (4, min(256, longest))
        encoded = opened.tokens.encode(read_text(())[:400_000].decode())
    text = torch.tensor(encoded, device=next(model.parameters()).device)
    weights = [w for w in weights_of(model) if w.route.role == "hidden" and w.route.param.ndim == 2]
    numbers = sorted({w.layer for w in weights if w.layer is not None})
    taken = numbers if quick else (numbers[0], numbers[len(numbers) // 2], numbers[-1])
    hidden = {_short(w.name): w.route.param for w in weights if w.layer in taken}
    for param in model.parameters():
        param.requires_grad_(False)
    for p in hidden.values():
        p.requires_grad_(True)
    momentum = {n: torch.zeros_like(p) for n, p in hidden.items()}
    matrices: dict[str, Tensor] = {}
    rows, length = window
    for index in range(batches):
        gradients = {n: torch.zeros_like(p) for n, p in hidden.items()}
        last = index == batches - 1
        for replica in range(NUM_REPLICAS if last else 1):
            start = (index + replica) * rows * length
            ids = text[start : start + rows * length].view(rows, length)
            logits = model(input_ids=ids).logits
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
            for n, p in hidden.items():
                assert p.grad is not None
                gradients[n] += p.grad
                if last:
                    matrices[key("pretrained", "gradient", n, replica)] = p.grad
                p.grad = None
        for n in hidden:
            gradients[n] /= NUM_REPLICAS if last else 1
            momentum[n].lerp_(gradients[n], 1 - BETA)
    for n, p in hidden.items():
        matrices[key("pretrained", "gradient", n)] = gradients[n]
        matrices[key("pretrained", "momentum", n)] = momentum[n]
        matrices[key("pretrained", "weight", n)] = p.detach()
    about = {"model": name, "of": chosen, "batches": batches, "window": list(window), "layers": list(hidden)}
    write(folder, matrices, about)


def _training(folder: Path, quick: bool) -> None:
    training.train(folder, quick)
    (folder / ABOUT).write_text(json.dumps(training.identity(quick), indent=1))


def _vision_rates(folder: Path, quick: bool) -> None:
    (folder / ABOUT).write_text(json.dumps(tune(folder, quick), indent=1))


INPUTS = {
    i.name: i
    for i in (
        Input(
            name="text-training",
            about="gradients, momenta, weight changes and weights of the byte-level Llama (nano, 0.46 M "
            "parameters) trained with "
            "Muon on the King James text, at four points of the run; gradients also of eight batches of 8 "
            "× 64 tokens apart",
            make=_text_training,
        ),
        Input(
            name="language-model",
            about="gradients and momenta of the pretrained {model} on the same text, first, middle and last layer, "
            "the weights held fixed; gradients also of eight batches of 4 × 256 tokens apart",
            make=_language_model,
            of_model=True,
        ),
        Input(name="training", about=training.ABOUT, make=_training, made_with=training.identity),
        Input(
            name="optimizers",
            about=fingerprints.ABOUT,
            make=fingerprints.make,
            made_with=fingerprints.identity,
        ),
        Input(
            name="vision-rates",
            about="learning rates of the vision methods: each tried at five, a factor 3 apart around what it is usually run with, "
            "the best by validation loss on a seed of its own",
            make=_vision_rates,
        ),
    )
}
