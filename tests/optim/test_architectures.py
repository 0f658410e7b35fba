"""How real architectures are routed, line by line: one table each, read by a person and kept in ``architectures/NAME.txt``.

``python -m tests.optim.test_architectures --write`` writes the tables anew; read the difference before committing it. The models
are built of ``transformers`` configurations at sizes that differ from one another wherever they can, without weights. Layers that
are routed alike are one line, and the number of layers stands behind it.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from muonwire.errors import UsageError
from muonwire.optim import route

TABLES = Path(__file__).parent / "architectures"
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
}


def _of(model: str, *, config: str | None = None, **options: object) -> Callable[[], nn.Module]:
    """Builds a model of a ``transformers`` class; its configuration's class follows from its name."""
    named = config or re.sub(r"(For[A-Z]\w+|LMHeadModel|DoubleHeadsModel|Model)$", "", model) + "Config"
    return lambda: getattr(transformers, model)(getattr(transformers, named)(**options))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "bart": _of(
        "BartForConditionalGeneration",
        **SPEECH,
        vocab_size=96,
        max_position_embeddings=40,
    ),
    "bert": _of("BertForPreTraining", **TEXT),
    "bloom": _of("BloomForCausalLM", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "clip": _of(
        "CLIPModel",
        text_config=TEXT,
        vision_config=VISION,
        projection_dim=24,
    ),
    "convnext": _of(
        "ConvNextV2ForImageClassification", hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], num_labels=7
    ),
    "deepseek_v3": _of(
        "DeepseekV3ForCausalLM",
        **GROUPED,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        q_lora_rank=20,
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=10,
    ),
    "dinov2": _of("Dinov2ForImageClassification", **VISION, num_labels=7),
    "falcon": _of("FalconForCausalLM", **TEXT, num_kv_heads=2, new_decoder_architecture=True),
    "gemma": _of("GemmaForCausalLM", **GROUPED, head_dim=10),
    "gpt2": _of(
        "GPT2LMHeadModel",
        config="GPT2Config",
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=40,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": _of("GPTNeoXForCausalLM", **TEXT),
    "gpt_oss": _of("GptOssForCausalLM", **GROUPED, **EXPERTS, head_dim=10),
    "jamba": _of(
        "JambaForCausalLM",
        **{**GROUPED, "num_hidden_layers": 4},
        num_experts=3,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=6,
        mamba_dt_rank=3,
        use_mamba_kernels=False,
    ),
    "llama": _of("LlamaForCausalLM", **GROUPED),
    "llama4": _of(
        "Llama4ForCausalLM",
        config="Llama4TextConfig",
        **GROUPED,
        num_local_experts=3,
        intermediate_size_mlp=48,
        head_dim=8,
    ),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**GROUPED),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_index=95,
        )
    ),
    "mamba": _of("MambaForCausalLM", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=6),
    "mamba2": _of(
        "Mamba2ForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=6,
        num_heads=8,
        head_dim=8,
        n_groups=2,
    ),
    "mixtral": _of("MixtralForCausalLM", **GROUPED, **EXPERTS),
    "modernbert": _of("ModernBertForMaskedLM", **TEXT, cls_token_id=1, sep_token_id=2),
    "olmo2": _of("Olmo2ForCausalLM", **GROUPED),
    "opt": _of(
        "OPTForCausalLM",
        **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
        ffn_dim=56,
        word_embed_proj_dim=24,
    ),
    "phi3": _of("Phi3ForCausalLM", **GROUPED),
    "qwen2_moe": _of(
        "Qwen2MoeForCausalLM",
        **GROUPED,
        num_experts=3,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
    ),
    "qwen3": _of("Qwen3ForCausalLM", **GROUPED, head_dim=10),
    "qwen3_next": _of(
        "Qwen3NextForCausalLM",
        **GROUPED,
        **EXPERTS,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=6,
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=20,
    ),
    "recurrent_gemma": _of(
        "RecurrentGemmaForCausalLM", **{**GROUPED, "num_hidden_layers": 3}, lru_width=32, head_dim=8
    ),
    "resnet": _of(
        "ResNetForImageClassification",
        embedding_size=12,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        num_labels=7,
        layer_type="basic",
    ),
    "roberta": _of("RobertaForSequenceClassification", **TEXT, num_labels=7),
    "roberta_masked": _of("RobertaForMaskedLM", **TEXT),
    "rwkv": _of(
        "RwkvForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        intermediate_size=56,
    ),
    "segformer": _of(
        "SegformerForSemanticSegmentation",
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 4],
        decoder_hidden_size=28,
        num_labels=7,
    ),
    "swin": _of(
        "SwinForImageClassification",
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        image_size=16,
        patch_size=2,
        window_size=4,
        num_labels=7,
    ),
    "switch": _of(
        "SwitchTransformersForConditionalGeneration",
        vocab_size=96,
        d_model=32,
        d_ff=56,
        d_kv=10,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    "t5": _of(
        "T5ForConditionalGeneration", vocab_size=96, d_model=32, d_ff=56, d_kv=10, num_layers=2, num_heads=4
    ),
    "vit": _of("ViTForImageClassification", **VISION, num_labels=7),
    "wav2vec2": _of(
        "Wav2Vec2ForCTC",
        **{**TEXT, "vocab_size": 30},
        conv_dim=[24, 24, 24],
        conv_kernel=[10, 3, 3],
        conv_stride=[5, 2, 2],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    ),
    "whisper": _of(
        "WhisperForConditionalGeneration",
        **SPEECH,
        vocab_size=96,
        num_mel_bins=20,
        max_source_positions=30,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "zamba2": _of(
        "Zamba2ForCausalLM",
        **{**GROUPED, "num_hidden_layers": 3},
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=6,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=2,
        num_mem_blocks=1,
        use_mem_rope=True,
        adapter_rank=5,
    ),
}


def table(name: str) -> str:
    """The routing of one architecture, with layers that are routed alike in one line."""
    with torch.device("meta"):
        text = str(route(ARCHITECTURES[name]()))
    head, *lines, total = text.splitlines()
    rows: dict[tuple[str, ...], int] = {}
    for line in lines:
        cells = re.split(r"  +", line)
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "N", cells[0]), *cells[1:])
        rows[key] = rows.get(key, 0) + 1
    names = re.split(r"  +", head)
    cells_of = [
        names,
        *([row[0] + (f" ({count})" if count > 1 else ""), *row[1:]] for row, count in rows.items()),
    ]
    widths = [max(len(row[i]) for row in cells_of if i < len(row)) for i in range(5)]
    padded = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in cells_of
    ]
    return "\n".join([*padded, total, ""])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_routed_as_its_table_says(name):
    assert table(name) == (TABLES / f"{name}.txt").read_text()


def test_an_architecture_that_holds_its_matrices_itself_is_in_doubt():
    model = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4)
    )
    with pytest.raises(UsageError, match=r"rel_attn\.q \(XLNetRelativeAttention, 32x4x8\) and 1 alike"):
        route(model)
    decided = route(model, adam=[r"rel_attn\.[qkvor]$"])
    assert len(decided.polar) == 4


def test_every_table_belongs_to_an_architecture():
    assert {path.stem for path in TABLES.iterdir()} == set(ARCHITECTURES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables instead of printing them")
    parser.add_argument("names", nargs="*", help="of architectures; default: all")
    given = parser.parse_args()
    for each in given.names or ARCHITECTURES:
        made = table(each)
        if given.write:
            (TABLES / f"{each}.txt").write_text(made)
        else:
            print(f"{each}\n{made}")
