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


def small_llama(*, vocabulary: int, layers: int = 2, tied: bool = True, **options):
    """A Llama of layers of 32 features with random weights, which follow from torch's generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def write_model(folder: Path, *, vocabulary: int = 264, **options) -> Path:
    """A small Llama and a tokenizer, of which it knows more tokens than there are."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        small_llama(vocabulary=vocabulary, eos_token_id=END, **options).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
