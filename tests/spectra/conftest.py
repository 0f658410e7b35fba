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


def write_gguf(path: Path) -> None:
    """A Llama of one layer with random weights in blocks of eight bits, and a tokenizer of bytes."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, 258),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, [*bytes_to_unicode().values(), "<end>", "ab"]),
        (writer.add_token_types, [1] * 256 + [3, 1]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 256),
        (writer.add_eos_token_id, 256),
    ):
        add(value)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (258, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    shapes |= {f"blk.0.attn_{kind}": (64, 64) for kind in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
