"""Gradients and momenta of a pretrained language model on a text, its weights held fixed."""

from pathlib import Path

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.lab import Input
from muonwire.lab.inputs.captured import BETA, NUM_REPLICAS, key, short_name, write
from muonwire.spectra.models import open_model
from muonwire.spectra.weights import weights_of
from muonwire.tasks.models import build_llama
from muonwire.tasks.text import read_text


def make(folder: Path, quick: bool, chosen: str) -> None:
    """Open the model, and write what each batch gives; an untrained one where it is quick."""
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
    hidden = {short_name(w.name): w.route.param for w in weights if w.layer in taken}
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


LANGUAGE_MODEL = Input(
    name="language-model",
    about="gradients and momenta of the pretrained {model} on the same text, first, middle and last layer, the weights held "
    "fixed; gradients also of eight batches of 4 × 256 tokens apart",
    make=make,
    of_model=True,
)
