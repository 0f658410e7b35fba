"""Language models from ``transformers`` configurations."""

from dataclasses import dataclass

from torch import nn

from muonwire.tasks.base import build_seeded, named


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A Llama configuration, without its vocabulary.

    Args:
        width: hidden size.
        depth: number of layers.
        heads: attention heads.
        mlp: width of the MLP.
    """

    width: int
    depth: int
    heads: int
    mlp: int


MODEL_SIZES = {
    "pico": ModelSize(width=64, depth=2, heads=2, mlp=192),
    "nano": ModelSize(width=128, depth=2, heads=4, mlp=384),
    "micro": ModelSize(width=192, depth=6, heads=6, mlp=512),
    "mini": ModelSize(width=320, depth=8, heads=5, mlp=896),
    "small": ModelSize(width=576, depth=12, heads=9, mlp=1536),
}


def build_llama(size_name: str, *, vocabulary: int, sequence: int, seed: int) -> nn.Module:
    """A randomly initialized causal Llama with tied embeddings.

    Args:
        size_name: a key of MODEL_SIZES.
        vocabulary: number of tokens.
        sequence: longest sequence, in tokens.
        seed: of the initial weights.

    Raises:
        UsageError: an unknown size.
    """
    size = named("model size", size_name, MODEL_SIZES)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=sequence,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return build_seeded(lambda: LlamaForCausalLM(config), seed=seed)
