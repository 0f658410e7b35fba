"""Gradients, momenta, weight changes and weights of a small Llama that trains with Muon."""

from pathlib import Path

import torch
from torch import Tensor

from muonwire import recipes
from muonwire.lab import Input
from muonwire.lab.inputs.captured import BETA, NUM_REPLICAS, hidden_matrices, key, write
from muonwire.tasks.text import TextSettings, TextTask


def make(folder: Path, quick: bool) -> None:
    """Train, and write the matrices of each point."""
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


TEXT_TRAINING = Input(
    name="text-training",
    about="gradients, momenta, weight changes and weights of the byte-level Llama (nano, 0.46 M parameters) trained with "
    "Muon on the King James text, at four points of the run; gradients also of eight batches of 8 × 64 tokens apart",
    make=make,
)
