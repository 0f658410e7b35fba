"""A causal language model of transformers, of some thousand parameters, with a tokenizer of its own."""

from pathlib import Path

import torch

TOKENS = 257
END = 256


def write_tokenizer(folder: Path, *, end: bool = True) -> None:
    """A token for each byte, and one that ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<end>": END}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = {"eos_token": "<end>"} if end else {}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def write_model(folder: Path, *, vocabulary: int = 264, tied: bool = True, **options) -> Path:
    """A Llama of two layers of 32 features with random weights; it knows more tokens than its tokenizer has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=END,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
