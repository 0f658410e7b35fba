"""The user's own language model: from scratch, continued, with adapters, and what is left of it for other programs."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from muonwire.errors import UsageError
from muonwire.tasks import TextSettings
from muonwire.tasks import text as text_task
from muonwire.tasks.pretrained import find_model, load_model
from muonwire.tasks.text import pack
from tests.small_lm import END, TOKENS, write_model, write_tokenizer
from tests.spectra.conftest import write_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lm") / "small")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("In the beginning was the word, and the word was short. " * 60)
    return path


@pytest.fixture(scope="module")
def settings(folder, text):
    return TextSettings(model=str(folder), text=(text,), sequence=16, batch=4, evaluation_sequences=4)


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(task, model, batch):
    model.zero_grad()
    loss = task.loss(model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_model_with_weights_goes_on_from_them_with_its_own_tokenizer(settings, folder):
    task = settings.make()
    model = task.build_model(seed=5)
    stored = AutoModelForCausalLM.from_pretrained(folder)
    for (name, got), want in zip(model.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(got, want), name
    assert model.training
    # It knows seven tokens that its tokenizer never gives.
    assert task.vocabulary == TOKENS
    assert task.description["tokenizer"] == str(folder)
    said = AutoTokenizer.from_pretrained(folder).decode(task.train_tokens[:16].tolist())
    assert said == "In the beginning"


def test_a_configuration_begins_from_scratch_by_its_seed(settings, folder):
    scratch = replace(settings, model=str(folder / "config.json")).make()
    first, again, other = (scratch.build_model(seed=s) for s in (1, 1, 2))
    key = "model.layers.0.mlp.up_proj.weight"
    weights = [dict(m.named_parameters())[key] for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert scratch.vocabulary == TOKENS


def test_documents_are_packed_with_the_end_token_or_a_line_break_between(folder, tmp_path):
    write_tokenizer(tmp_path, end=False)
    ending, plain = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path)
    one, two = (ending(t)["input_ids"] for t in ("one", "two"))
    assert pack([b"one", b"two"], ending).tolist() == [*one, END, *two, END]
    assert plain.decode(pack([b"one", b"two"], plain).tolist()) == "one\ntwo"


def test_many_documents_are_tokenized_in_parts(folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [f"document {n}".encode() for n in range(7)]
    at_once = pack(documents, tokenizer)
    monkeypatch.setattr(text_task, "TOKENIZED_AT_ONCE", 3)
    assert torch.equal(pack(documents, tokenizer), at_once)


@pytest.mark.parametrize("named", ["folder", "tokenizer.json"])
def test_a_tokenizer_of_another_model_ends_documents_as_its_own_does(named, settings, folder, tmp_path):
    write_tokenizer(tmp_path, end=True)
    other = tmp_path if named == "folder" else tmp_path / named
    given, own = replace(settings, tokenizer=str(other)).make(), settings.make()
    assert torch.equal(given.train_tokens, own.train_tokens)
    assert given.export(given.build_model(seed=0), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<end>"
    # The preset takes the same names.
    assert replace(settings, model=None, tokenizer=str(other)).make().vocabulary == TOKENS


def test_a_tokenizer_may_have_tokens_that_the_text_has_not(settings, tmp_path):
    exact = write_model(tmp_path / "exact", vocabulary=TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(exact)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(exact)
    assert len(tokenizer) == TOKENS + 1
    task = replace(settings, model=str(exact)).make()
    assert task.vocabulary == TOKENS
    assert task.build_model(seed=0).training


def test_a_tokenizer_without_settings_beside_it(settings, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    named = replace(settings, tokenizer=str(tmp_path / "tokenizer.json")).make()
    assert named.train_tokens[:200].tolist() == settings.make().train_tokens[:200].tolist()
    assert replace(settings, tokenizer="bytes").make().vocabulary == 256


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_exported_opens_in_transformers_and_says_the_same(tied, settings, tmp_path):
    source = write_model(tmp_path / "source", tied=tied)
    task = replace(settings, model=str(source)).make()
    model = task.build_model(seed=0)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/left_over").touch()
    assert task.export(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = task.train_tokens[None, :16]
    with torch.no_grad():
        assert torch.equal(opened.eval()(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("x")["input_ids"]
    assert not (tmp_path / "out/left_over").exists()
    assert (opened.get_input_embeddings().weight is opened.get_output_embeddings().weight) == tied


def test_a_preset_is_not_exported(text, tmp_path):
    task = TextSettings(model_size="pico", text=(text,), sequence=16).make()
    assert not task.export(task.build_model(seed=0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_alone_are_trained_and_their_base_is_read_once(settings):
    task = replace(settings, lora=4).make()
    first, second = task.build_model(seed=0), task.build_model(seed=1)
    names = trainable(first)
    # Two layers of seven linear maps, A and B of each.
    assert len(names) == 28
    assert all(".lora_A." in n or ".lora_B." in n for n in names)
    assert {n for n, _ in task.carried(first)} >= set(names)
    assert not any("base_layer" in n for n, _ in task.carried(first))
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    for name, param in ours.items():
        assert (param is theirs[name]) == (name not in names)
    a = next(n for n in names if ".lora_A." in n)
    assert not torch.equal(ours[a], theirs[a])
    # B begins with zeros: the model is at first what it was.
    batch = task.batch(seed=0, step=1, rank=0, world_size=1)
    plain = settings.make().build_model(seed=0)
    assert torch.equal(task.loss(first, batch), task.loss(plain, batch))


def test_adapters_are_exported_as_peft_opens_them(settings, folder, tmp_path):
    from peft import AutoPeftModelForCausalLM

    chosen = replace(settings, lora=2, lora_alpha=3.0, lora_targets=("q_proj", "v_proj"))
    task = chosen.make()
    model = task.build_model(seed=0)
    with torch.no_grad():
        for param in trainable(model).values():
            param.add_(0.1)
    assert task.export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 3.0)
    assert written["base_model_name_or_path"] == str(folder)
    assert (tmp_path / "out/adapter_model.safetensors").stat().st_size < 20_000
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = task.train_tokens[None, :16]
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_adapters_of_a_gguf_file_open_on_its_decoded_weights(settings, tmp_path):
    from peft import PeftModel

    write_gguf(tmp_path / "tiny.gguf")
    task = replace(settings, model=str(tmp_path / "tiny.gguf"), lora=2, dtype="bfloat16").make()
    model = task.build_model(seed=0)
    with torch.no_grad():
        for param in trainable(model).values():
            param.add_(0.1)
    assert task.export(model, tmp_path / "out")
    base = load_model(find_model(str(tmp_path / "tiny.gguf")), dtype=torch.bfloat16)
    opened = PeftModel.from_pretrained(base, tmp_path / "out")
    ids = task.train_tokens[None, :16]
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_adapters_of_a_bfloat16_model_are_float32(settings):
    model = replace(settings, lora=2, dtype="bfloat16").make().build_model(seed=0)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_base_of_adapters_is_part_of_what_identifies_a_run(settings, tmp_path):
    described = replace(settings, lora=2).make().description
    other = write_model(tmp_path / "other", vocabulary=260)
    assert (
        replace(settings, lora=2, model=str(other)).make().description["base_digest"]
        != described["base_digest"]
    )
    assert "base_digest" not in settings.make().description


def test_dropout_is_a_function_of_seed_and_step(settings):
    task = replace(settings, lora=2, lora_dropout=0.5).make()
    model = task.build_model(seed=0)
    with torch.no_grad():
        for param in trainable(model).values():
            param.add_(0.3)
    first = task.batch(seed=0, step=1, rank=0, world_size=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    loss = task.loss(model, first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(task.loss(model, first), loss)
    other = {**first, "seeds": task.batch(seed=0, step=2, rank=0, world_size=1)["seeds"]}
    assert not torch.equal(task.loss(model, other), loss)
    # Two replicas draw differently.
    seeds = [task.batch(seed=0, step=1, rank=r, world_size=2)["seeds"] for r in (0, 1)]
    assert not set(seeds[0].tolist()) & set(seeds[1].tolist())


@pytest.mark.parametrize("options", [{}, {"lora": 2, "lora_dropout": 0.2}])
def test_activations_that_are_computed_anew_give_the_same_gradients(settings, options):
    plain, anew = (replace(settings, checkpoint_activations=c, **options).make() for c in (False, True))
    batch = plain.batch(seed=0, step=1, rank=0, world_size=1)
    found = []
    for task in (plain, anew):
        model = task.build_model(seed=0)
        assert model.is_gradient_checkpointing == (task is anew)
        found.append(gradients(task, model, batch))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][name]), name


def test_settings_are_read_from_what_they_wrote_and_old_ones_name_nothing_new(settings):
    chosen = replace(settings, lora=2, lora_targets=("q_proj",), dtype="bfloat16", column="story")
    assert TextSettings.read(json.loads(json.dumps(chosen.identity()))) == chosen
    assert set(TextSettings().identity()) == {
        *("text", "tokenizer", "model_size", "sequence", "batch", "evaluation_sequences"),
    }
    assert TextSettings().identity()["tokenizer"] == "bytes"
    assert TextSettings(tokenizer="bytes") == TextSettings()


def test_a_model_that_sees_the_tokens_it_is_to_predict_is_refused(settings, tmp_path):
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    path = tmp_path / "config.json"
    write_tokenizer(tmp_path)
    for is_decoder in (True, False):
        BertConfig(
            vocab_size=TOKENS, max_position_embeddings=32, is_decoder=is_decoder, **sizes
        ).to_json_file(path)
        task = replace(settings, model=str(path)).make()
        if is_decoder:
            assert task.build_model(seed=0).training
        else:
            with pytest.raises(UsageError, match=r"BertLMHeadModel says .* depends on later ones"):
                task.build_model(seed=0)


def test_a_model_without_some_of_its_weights_is_refused(settings, tmp_path):
    lacks = write_model(tmp_path / "lacks", tied=False)
    weights = load_file(lacks / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, lacks / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks lm_head\.weight of the weights of a LlamaForCausalLM"):
        replace(settings, model=str(lacks)).make().build_model(seed=0)


def test_adapters_of_transposed_matrices(settings, tmp_path, recwarn):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    write_tokenizer(tmp_path)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=TOKENS, bos_token_id=END, eos_token_id=END, **sizes)
    ).save_pretrained(tmp_path)
    recwarn.clear()
    made = replace(settings, model=str(tmp_path), lora=2)
    shapes = {
        n.removeprefix("base_model.model.transformer.h.0."): tuple(p.shape)
        for n, p in trainable(made.make().build_model(seed=0)).items()
    }
    assert not recwarn.list
    assert shapes["attn.c_attn.lora_A.default.weight"] == (2, 32)
    assert shapes["attn.c_attn.lora_B.default.weight"] == (96, 2)
    with pytest.raises(UsageError, match="linear layers are c_attn, c_fc, c_proj, lm_head"):
        replace(made, lora_targets=("q_proj",)).make().build_model(seed=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, "allowed are float32, bfloat16"),
        ({"lora": -1}, "at least 1, or 0 for none"),
        ({"lora": 2, "model": None}, "no trained model for adapters"),
        ({"lora_dropout": 0.1}, "give their rank by --lora"),
        ({"lora": 2, "lora_dropout": 1.0}, r"lies in \[0, 1\)"),
        ({"lora": 2, "lora_alpha": -1.0}, "must be positive"),
    ],
)
def test_bad_options_say_what_is_allowed(settings, options, says):
    with pytest.raises(UsageError, match=says):
        replace(settings, **options)


def test_bad_models_say_what_is_wanted(settings, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    run = tmp_path / "run"
    write_model(run / "model")
    # As `muonwire train` leaves it there.
    (run / "config.json").write_text('{"recipe": "muon"}')
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "image.json").write_text('{"model_type": "resnet"}')
    own_code = (
        '{"model_type": "vit", "vocab_size": 264, "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}'
    )
    (tmp_path / "own_code.json").write_text(own_code)
    damaged = write_model(tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    (tmp_path / "other.json").write_text('{"recipe": "muon"}')
    long = write_model(tmp_path / "short_vocabulary", vocabulary=100)
    cases = [
        ({"model": "no/such-model"}, "from the hub it cannot be loaded .*hf download"),
        ({"model": str(tmp_path / "nothing")}, "is not there"),
        ({"model": str(adapters)}, "folder of adapters.*merge"),
        ({"model": str(run)}, "run/model has one; give that"),
        ({"model": str(bare)}, "no weights.*from scratch, give .*config.json"),
        ({"model": str(tmp_path / "other.json")}, "no model_type"),
        ({"model": str(tmp_path / "image.json"), "tokenizer": "bytes"}, "is no language model"),
        ({"model": str(bare / "config.json")}, "has no tokenizer beside it .*; name one with --tokenizer"),
        ({"model": str(damaged)}, "no tokenizer beside it that can be opened .Expecting property name"),
        (
            {"tokenizer": str(bare)},
            "tokenizer: .* cannot be loaded .*; give bytes, a tokenizer.json or the folder",
        ),
        ({"model": str(tmp_path / "own_code.json"), "tokenizer": "bytes"}, "code that it brings along"),
        ({"model": str(folder / "config.json"), "lora": 2}, "give a model that has weights"),
        ({"model": str(long)}, "text needs 257 tokens of its tokenizer, but the model knows 100"),
        ({"model": str(folder), "model_size": "pico"}, "model_size is 'pico', .*leave one of them out"),
        ({"sequence": 65}, "takes at most 64 tokens"),
        (
            {"lora": 2, "lora_targets": ("q_proj", "query")},
            "added to query; .* linear layers are down_proj, gate",
        ),
        ({"lora": 2, "lora_targets": ("q_proj", "lm_head")}, "lm_head shares its matrix with the embedding"),
        ({"lora": 2, "lora_targets": ("embed_tokens",)}, "cannot be added to embed_tokens"),
    ]
    for options, says in cases:
        with pytest.raises(UsageError, match=says):
            replace(settings, **options).make().build_model(seed=0)
