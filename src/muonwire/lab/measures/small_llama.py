"""A byte-level Llama of which whole Gauss-Newton blocks fit, and how many steps it needs from different starts."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from muonwire import recipes
from muonwire.tasks.text import TextTask

SMOOTHED = 10


def small_llama(*, width: int, seed: int) -> nn.Module:
    """The model before training: two layers, two heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        # The fused kernels have no forward-mode derivative.
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model


def train(model: nn.Module, task: TextTask, recipe: str, *, lr: float, steps: int, seed: int) -> list[float]:
    """Train, and give the loss at each step."""
    optimizer = recipes.build(recipe, model, lr=lr)
    losses = []
    for step in range(1, steps + 1):
        loss = task.loss(model, task.batch(seed=seed, step=step, rank=0, world_size=1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def steps_needed(curves: Mapping[float, Sequence[Sequence[float]]]) -> dict[float, int]:
    """For each start: steps until the smoothed loss is where the slowest start's best run ends, at the best rate for it.

    Args:
        curves: by start, the losses of one run for each rate.
    """
    window = np.ones(SMOOTHED) / SMOOTHED
    smooth = {
        # A run that diverged is at no step near any target.
        start: [np.nan_to_num(np.convolve(run, window, mode="valid"), nan=np.inf) for run in runs]
        for start, runs in curves.items()
    }
    target = max(min(float(run.min()) for run in runs) for runs in smooth.values())
    return {
        start: min(int(np.argmax(run <= target)) + SMOOTHED for run in runs if run.min() <= target)
        for start, runs in smooth.items()
    }
