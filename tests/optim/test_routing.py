import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from muonwire.errors import UsageError
from muonwire.optim import route
from muonwire.tasks import build_vision_model
from tests.models import SmallNet


def roles(model, **options):
    return {
        r.name: (r.role, "polar" if r.polar else "adam", str(r.layout))
        for r in route(model, **options).routes
    }


def llama(tied):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_routed_by_role(tied):
    got = roles(llama(tied))
    assert got["model.layers.0.self_attn.q_proj.weight"] == ("hidden", "polar", "matrix")
    assert got["model.layers.0.mlp.down_proj.weight"] == ("hidden", "polar", "matrix")
    assert got["model.embed_tokens.weight"] == ("embedding", "adam", "matrix")
    assert got["model.norm.weight"] == ("norm", "adam", "matrix")
    assert ("lm_head.weight" in got) == (not tied)
    if not tied:
        assert got["lm_head.weight"] == ("head", "adam", "matrix")


def test_a_gpt2_is_routed_by_role_and_its_fused_weight_splits():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=12, n_layer=1, n_head=2, n_positions=8))
    got = roles(model)
    assert got["transformer.h.0.attn.c_attn.weight"][:2] == ("hidden", "polar")
    assert got["transformer.h.0.attn.c_attn.bias"][:2] == ("bias", "adam")
    assert got["transformer.wpe.weight"][:2] == ("embedding", "adam")
    assert got["transformer.ln_f.weight"][:2] == ("norm", "adam")


def test_convolutions_experts_and_vectors():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.experts = nn.Parameter(torch.zeros(4, 6, 5))
            self.gain = nn.Parameter(torch.zeros(7))
            self.classifier = nn.Linear(8, 10)
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

    got = roles(Mixed())
    assert got["conv.weight"] == ("hidden", "polar", "conv")
    assert got["experts"] == ("hidden", "polar", "batch")
    assert got["gain"][:2] == ("vector", "adam")
    assert got["classifier.weight"][:2] == ("head", "adam")
    assert "frozen.weight" not in got
    shapes = {r.name: r.layout.matrices_shape(tuple(r.param.shape)) for r in route(Mixed()).polar}
    assert shapes == {"conv.weight": (8, 27), "experts": (4, 6, 5)}


def test_tokens_and_positions_of_a_vision_transformer_are_embeddings():
    model = build_vision_model("vit_pico", shape=(28, 28), num_classes=10, seed=0)
    got = roles(model)
    assert got["vit.embeddings.cls_token"][:2] == ("embedding", "adam")
    assert got["vit.embeddings.position_embeddings"][:2] == ("embedding", "adam")
    assert got["vit.embeddings.patch_embeddings.projection.weight"] == ("hidden", "polar", "conv")
    chosen = roles(model, polar=["position_embeddings"])
    assert chosen["vit.embeddings.position_embeddings"] == ("embedding", "polar", "batch")


class ScaledEmbedding(nn.Module):
    def __init__(self, vocabulary, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocabulary, width))


def test_heads_and_embeddings_under_other_peoples_names_go_to_adam():
    names = {
        "tok_embeddings": nn.Embedding(50, 8),
        "bag": nn.EmbeddingBag(50, 8),
        "token_emb": ScaledEmbedding(50, 8),
        "wq": nn.Linear(8, 8, bias=False),
        "output": nn.Linear(8, 50, bias=False),
        "to_logits": nn.Linear(8, 50, bias=False),
    }
    got = roles(nn.ModuleDict(names))
    told = {name: got[f"{name}.weight"][:2] for name in names}
    embeddings, heads = (
        dict.fromkeys(("tok_embeddings", "bag", "token_emb"), ("embedding", "adam")),
        ("head", "adam"),
    )
    assert told == {**embeddings, "wq": ("hidden", "polar"), "output": heads, "to_logits": heads}
    wrapped = roles(nn.ModuleDict({"_orig_mod": nn.ModuleDict(names)}))
    assert {name: wrapped[f"_orig_mod.{name}.weight"][:2] for name in names} == told


def test_positions_as_a_bare_parameter_are_an_embedding():
    model = nn.Sequential(nn.Linear(4, 4))
    model.pos_emb = nn.Parameter(torch.zeros(16, 4))
    assert roles(model)["pos_emb"][:2] == ("embedding", "adam")


def test_the_output_of_a_numbered_layer_is_hidden():
    layers = nn.ModuleList([nn.ModuleDict({"output": nn.Linear(6, 6)}) for _ in range(2)])
    assert roles(nn.ModuleDict({"layers": layers}))["layers.1.output.weight"][:2] == ("hidden", "polar")


def test_only_convolutions_whose_filters_see_all_inputs_are_orthogonalized():
    got = roles(
        nn.ModuleDict(
            {
                "depthwise": nn.Conv2d(16, 16, 3, groups=16),
                "grouped": nn.Conv1d(16, 32, 3, groups=4),
                "transposed": nn.ConvTranspose2d(16, 8, 2),
                "pointwise": nn.Conv2d(16, 16, 1),
                "recurrent": nn.LSTM(4, 4),
            }
        )
    )
    assert got["depthwise.weight"][:2] == got["grouped.weight"][:2] == ("grouped", "adam")
    assert got["transposed.weight"][:2] == ("transposed", "adam")
    assert got["pointwise.weight"] == ("hidden", "polar", "conv")
    assert got["recurrent.weight_hh_l0"][:2] == ("recurrent", "adam")


def test_a_mamba_keeps_its_recurrence_and_its_one_column_from_the_polar_factor():
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    got = roles(model)
    mixer = "backbone.layers.0.mixer."
    assert got[f"{mixer}A_log"][:2] == ("state space", "adam")
    assert got[f"{mixer}conv1d.weight"][:2] == ("grouped", "adam")
    assert got[f"{mixer}dt_proj.weight"][:2] == ("vector", "adam")
    polar = {name for name, (_, treated, _) in got.items() if treated == "polar"}
    assert polar == {f"{mixer}{part}.weight" for part in ("in_proj", "x_proj", "out_proj")}


def test_patterns_overrule_roles():
    got = roles(SmallNet(), adam=["down"], polar=["up.weight"])
    assert got["down.weight"][1] == "adam"
    assert got["up.weight"][1] == "polar"


def test_fused_weights_split_into_equal_parts():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24, bias=False)})
    (only,) = route(model, split={"qkv": 3}).polar
    assert only.layout.matrices_shape((24, 8)) == (3, 8, 8)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (nn.LayerNorm(4), {}, "none of 2 trainable parameters"),
        (nn.Embedding(4, 4), {}, "none of 1 trainable"),
        (SmallNet(), {"adam": ["up", "down"]}, "none of"),
        (SmallNet(), {"polar": ["up.weight"], "adam": ["up"]}, "belongs to one group"),
        (SmallNet(), {"polar": ["lm_head"]}, "one tied parameter"),
        (SmallNet(), {"polar": ["embed"]}, "one tied parameter"),
        (SmallNet(), {"polar": ["no_such"]}, "match no trainable parameter"),
        (SmallNet(), {"split": {"up": 5}}, "do not split into 5"),
        (SmallNet(), {"split": {"up": 2, "weight": 3}}, "2 entries of split"),
        (SmallNet(), {"polar": ["norm.weight"]}, "is no matrix"),
    ],
)
def test_what_is_in_doubt_is_an_error(model, options, says):
    with pytest.raises(UsageError, match=says):
        route(model, **options)


def test_the_table_tells_every_parameter_and_the_total():
    text = str(route(SmallNet()))
    assert "2 of 6 tensors orthogonalized: 192 of 348 parameters" in text
    assert sum("polar" in line for line in text.splitlines()) == 2
