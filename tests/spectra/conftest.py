"""Small models with random weights of the kinds that transformers has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn


def build_small(kind: str, *, seed: int = 0) -> nn.Module:
    """A causal LM over bytes: "llama" (untied head, grouped keys), "tied" (Llama), "gpt2" (Conv1D) or "mixtral" (experts)."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    if kind == "gpt2":
        model: nn.Module = GPT2LMHeadModel(
            GPT2Config(
                n_embd=32,
                n_layer=2,
                n_head=2,
                vocab_size=256,
                n_positions=64,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=kind == "tied"))
    return model.eval()


KINDS = ("llama", "tied", "gpt2", "mixtral")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a small model into a folder."""

    def save(kind: str) -> Path:
        folder = tmp_path / kind
        build_small(kind).save_pretrained(folder)  # type: ignore[operator]
        return folder

    return save
