import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from muonwire.errors import UsageError
from muonwire.optim import route
from muonwire.tasks import build_vision_model
from tests.models import SmallNet
from tests.small_lm import small_llama


def roles(model, **options):
    return {
        r.name: (r.role, "polar" if r.polar else "adam", str(r.layout))
        for r in route(model, **options).routes
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_routed_by_role(tied):
    got = roles(small_llama(vocabulary=32, layers=1, tied=tied))
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
    assert got["transformer.h.0.attn.c_attn.weight"] == ("hidden", "polar", "matrix.T")
    split = roles(model, split={"c_attn": 3})
    assert split["transformer.h.0.attn.c_attn.weight"] == ("hidden", "polar", "matrix.T/3")
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
    shapes = {r.name: r.layout.shapes(tuple(r.param.shape)) for r in route(Mixed()).polar}
    assert shapes == {"conv.weight": [(8, 27)], "experts": [(4, 6, 5)]}


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
    expected = {name: got[f"{name}.weight"][:2] for name in names}
    embeddings, heads = (
        dict.fromkeys(("tok_embeddings", "bag", "token_emb"), ("embedding", "adam")),
        ("head", "adam"),
    )
    assert expected == {**embeddings, "wq": ("hidden", "polar"), "output": heads, "to_logits": heads}
    wrapped = roles(nn.ModuleDict({"_orig_mod": nn.ModuleDict(names)}))
    assert {name: wrapped[f"_orig_mod.{name}.weight"][:2] for name in names} == expected


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
    assert only.layout.shapes((24, 8)) == [(3, 8, 8)]
    for given, shapes in (
        ((16, 4, 4), [(16, 8), (4, 8), (4, 8)]),
        ([16, 8], [(16, 8), (8, 8)]),
        ("16+8", [(16, 8), (8, 8)]),
        ("2 interleaved", [(2, 12, 8)]),
        ("3 interleaved by 4", [(3, 8, 8)]),
    ):
        (only,) = route(model, split={"qkv": given}).polar
        assert only.layout.shapes((24, 8)) == shapes


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
        (
            SmallNet(),
            {"split": {"up": (8, 8)}},
            r"12 rows of shape \(12, 8\) do not split into parts of \(8, 8\)",
        ),
        (SmallNet(), {"split": {"up": "2 by 2"}}, "parts are '2 by 2'; write their number"),
        (SmallNet(), {"split": {"up": "3 interleaved by 8"}}, "into 3 equal parts, 8 rows at a time"),
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


class Attention(nn.Module):
    """Matrices that no layer of torch holds."""

    def __init__(self, width):
        super().__init__()
        self.wq, self.wk = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.zeros(width, width))
        self.gain = nn.Parameter(torch.zeros(width))


def unknown_layers():
    return nn.ModuleDict(
        {
            "layers": nn.ModuleList([Attention(6) for _ in range(3)]),
            "fc": nn.Linear(6, 6),
            "mixer": nn.Bilinear(4, 5, 6),
        }
    )


def test_matrices_of_unknown_classes_are_in_doubt_all_at_once():
    with pytest.raises(UsageError) as raised:
        route(unknown_layers())
    message = str(raised.value)
    for part in (
        "layers.0.wq (Attention, 6x6) and 2 alike",
        "layers.0.wk (Attention, 6x6) and 2 alike",
        "mixer.weight (Bilinear, 6x4x5)",
        r"polar=['0\\.wq$', ...]",
        "adam=[",
    ):
        assert part in message
    assert "gain" not in message
    got = roles(unknown_layers(), polar=[r"w[qk]$"], adam=["mixer"])
    assert got["layers.2.wk"] == ("unknown", "polar", "matrix")
    assert got["mixer.weight"][:2] == ("unknown", "adam")
    with pytest.raises(UsageError, match=r"Bilinear(?!.*Attention)"):
        route(unknown_layers(), polar=[r"w[qk]$"])


class ColumnParallelLinear(nn.Module):
    def __init__(self, inputs, outputs, inputs_first=False):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.zeros((inputs, outputs) if inputs_first else (outputs, inputs)))


def test_classes_that_are_linear_by_name_are_hidden_and_tell_their_orientation():
    layers = {
        "usual": ColumnParallelLinear(4, 6),
        "turned": ColumnParallelLinear(4, 6, inputs_first=True),
        "square": ColumnParallelLinear(6, 6),
    }
    got = roles(nn.ModuleDict(layers))
    assert got["usual.weight"] == got["square.weight"] == ("hidden", "polar", "matrix")
    assert got["turned.weight"] == ("hidden", "polar", "matrix.T")
    layers["usual"].out_features = 12
    with pytest.raises(UsageError, match=r"usual\.weight \(ColumnParallelLinear, 6x4\)"):
        route(nn.ModuleDict(layers))


def test_the_inputs_of_torchs_attention_are_three_matrices():
    model = nn.ModuleDict(
        {"one": nn.MultiheadAttention(8, 2), "two": nn.MultiheadAttention(8, 2, kdim=6, vdim=5)}
    )
    got = roles(model)
    assert got["one.in_proj_weight"] == ("hidden", "polar", "matrix/3")
    for part in ("q", "k", "v"):
        assert got[f"two.{part}_proj_weight"] == ("hidden", "polar", "matrix")
    assert got["one.out_proj.weight"] == ("hidden", "polar", "matrix")
    assert roles(model, split={"in_proj": 1})["one.in_proj_weight"][2] == "matrix"


def test_a_stack_of_attentions_inputs_is_a_batch():
    model = nn.Sequential(nn.Linear(8, 8))
    model.qkvo_w = nn.Parameter(torch.zeros(4, 8, 8))
    assert roles(model)["qkvo_w"] == ("hidden", "polar", "batch")


class Wrapper(nn.Module):
    def __init__(self, inner, name):
        super().__init__()
        setattr(self, name, inner)


@pytest.mark.parametrize(
    "path", ["_orig_mod", "module", "_fsdp_wrapped_module", "base_model.model", "my_language_model"]
)
def test_a_head_is_found_inside_any_wrapper(path):
    model = small_llama(vocabulary=32, layers=1, tied=False)
    for name in reversed(path.split(".")):
        model = Wrapper(model, name)
    got = roles(model)
    assert got[f"{path}.lm_head.weight"][:2] == ("head", "adam")
    assert got[f"{path}.model.embed_tokens.weight"][:2] == ("embedding", "adam")
    assert got[f"{path}.model.layers.0.mlp.up_proj.weight"][:2] == ("hidden", "polar")


def test_a_compiled_model_and_a_sequence_around_a_model_keep_their_heads():
    compiled = roles(torch.compile(small_llama(vocabulary=32, layers=1, tied=False), backend="eager"))
    assert compiled["_orig_mod.lm_head.weight"][:2] == ("head", "adam")
    plain = nn.ModuleDict({"body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 50)})
    assert roles(nn.Sequential(plain))["0.lm_head.weight"][:2] == ("head", "adam")


@pytest.mark.parametrize(
    ("layers", "head"),
    [
        ({"classifier": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))}, "classifier.2.weight"),
        ({"score_head": nn.Linear(8, 3)}, "score_head.weight"),
        ({"lm_head": nn.ModuleDict({"dense": nn.Linear(8, 8), "decoder": nn.Linear(8, 50)})}, "lm_head.decoder.weight"),
        ({"fc_out": nn.Linear(8, 50)}, "fc_out.weight"),
        ({"output_layer": nn.Linear(8, 50)}, "output_layer.weight"),
        ({"unembed": nn.Linear(8, 50)}, "unembed.weight"),
        # No name tells; its shape is the embedding's.
        ({"wordwise": nn.Linear(8, 50)}, "wordwise.weight"),
        ({"conv": nn.Conv2d(3, 8, 3), "block": nn.Conv2d(8, 8, 3), "fc": nn.Linear(8, 10)}, "fc.weight"),
    ],
)  # fmt: skip
def test_heads_by_name_by_place_and_by_shape(layers, head):
    first = {} if "conv" in layers else {"tokens": nn.Embedding(50, 8), "body": nn.Linear(8, 8)}
    got = roles(nn.ModuleDict({**first, **layers}))
    assert {name for name, (role, _, _) in got.items() if role == "head"} == {head}


def test_a_list_of_attention_heads_is_no_head():
    heads = nn.ModuleList(
        [nn.ModuleDict({"key": nn.Linear(8, 4), "value": nn.Linear(8, 4)}) for _ in range(2)]
    )
    got = roles(nn.ModuleDict({"heads": heads, "multi_head": nn.Linear(8, 8)}))
    assert {role for name, (role, _, _) in got.items() if name.endswith("weight")} == {"hidden"}


def test_a_square_output_and_a_pooling_head_are_hidden():
    pooling = type("AttentionPoolingHead", (nn.Sequential,), {})(nn.Linear(8, 8), nn.Linear(8, 4))
    got = roles(
        nn.ModuleDict(
            {"tower": nn.ModuleDict({"head": pooling, "output": nn.Linear(8, 8)}), "x": nn.Linear(8, 8)}
        )
    )
    assert {role for name, (role, _, _) in got.items() if name.endswith("weight")} == {"hidden"}


def test_bare_positions_biases_and_what_every_example_is_given_go_to_adam():
    model = nn.Sequential(nn.Linear(8, 8))
    names = {
        "rel_pos_h": (27, 8),
        "pos_bias_u": (4, 8),
        "frame": (1, 3, 8),
        "latents": (16, 8),
        "relative_position_bias_table": (9, 4),
    }
    for name, shape in names.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    got = roles(model)
    assert {name: got[name][0] for name in names} == dict.fromkeys(names, "embedding") | {
        "pos_bias_u": "bias"
    }


def test_a_router_beside_experts_goes_to_adam_and_a_gate_without_them_does_not():
    experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    got = roles(
        nn.ModuleDict(
            {
                "moe": nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": experts}),
                "mlp": nn.ModuleDict({"gate": nn.Linear(8, 16), "up": nn.Linear(8, 16)}),
            }
        )
    )
    assert got["moe.gate.weight"][:2] == ("router", "adam")
    assert got["mlp.gate.weight"][:2] == ("hidden", "polar")


def test_a_parametrized_weight_is_its_modules_and_a_weight_norm_is_no_matrix():
    parametrizations = nn.utils.parametrizations
    got = roles(
        nn.ModuleDict(
            {
                "spectral": parametrizations.spectral_norm(nn.Linear(8, 6)),
                "weight": parametrizations.weight_norm(nn.Linear(8, 6)),
            }
        )
    )
    assert got["spectral.parametrizations.weight.original"] == ("hidden", "polar", "matrix")
    assert got["weight.parametrizations.weight.original1"][:2] == ("reparametrized", "adam")


class GptOssExperts(nn.Module):
    is_transposed, is_concatenated = True, False

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 12))
        self.down_proj = nn.Parameter(torch.zeros(2, 6, 8))


def test_experts_that_say_so_are_transposed_and_interleaved():
    got = roles(nn.ModuleDict({"experts": GptOssExperts()}))
    assert got["experts.gate_up_proj"] == ("hidden", "polar", "batch.T/2 interleaved")
    assert got["experts.down_proj"] == ("hidden", "polar", "batch.T")
    # The number of the parts alone leaves their order as it is known.
    assert roles(nn.ModuleDict({"experts": GptOssExperts()}), split={"gate_up": 2}) == got
