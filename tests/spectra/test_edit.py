"""Editing models and writing them."""

import errno
import json
import math
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.spectra import edit as editing
from muonwire.spectra.edit import edit_model, num_edited, read_record, write_model
from muonwire.spectra.edits import parse_edits
from muonwire.spectra.measure import singular_values
from muonwire.spectra.models import Opened, open_model
from muonwire.spectra.weights import weights_of
from tests.spectra.conftest import KINDS, build_small, write_gguf

IDS = torch.arange(40)[None] % 256


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_edit_is_a_copy(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Bit for bit, also through the written folder."""
    opened = open_model(str(saved(kind)), device="cpu")
    before = _logits(opened.model)
    assert edit_model(opened.model, ()) == []
    folder = write_model(opened, tmp_path / "copy")
    assert torch.equal(_logits(open_model(str(folder), device="cpu").model), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_back_has_the_wanted_spectrum(
    kind: str, dtype: torch.dtype, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """To the norm of the rounding (Weyl), in the dtype that is stored."""
    opened = open_model(str(saved(kind)), device="cpu", dtype=dtype)
    edits = parse_edits(["flatten(power=0.5)", "drop(fraction=0.25, which='smallest', kind='mlp')"])
    done = {e.name: e for e in edit_model(opened.model, edits)}
    assert len(done) == num_edited(opened.model, edits) > 0
    folder = write_model(opened, tmp_path / "edited", edits=edits, edited=list(done.values()))
    again = open_model(str(folder), device="cpu")
    read = {n: m for w in weights_of(again.model) for n, m in w.matrices()}
    assert next(again.model.parameters()).dtype == dtype
    for name, one in done.items():
        bound = torch.finfo(dtype).eps / 2 * float(read[name].float().norm()) * 1.01 + 1e-12
        assert float((singular_values(name, read[name]) - one.wanted).abs().max()) <= bound, name
    record = read_record(folder)
    assert record["edits"] == [str(e) for e in edits]
    assert set(record["matrices"]) == set(done)


def test_a_gguf_file_is_edited_and_written(tmp_path: Path) -> None:
    """Its blocks become matrices; what is written opens as a folder, with its tokenizer, and says the same."""
    write_gguf(tmp_path / "tiny.gguf")
    opened = open_model(str(tmp_path / "tiny.gguf"), device="cpu")
    ids = torch.arange(20)[None]
    copy = open_model(str(write_model(opened, tmp_path / "copy")), device="cpu")
    assert torch.equal(copy.model(input_ids=ids).logits, opened.model(input_ids=ids).logits)
    assert copy.tokens is not None
    assert opened.tokens is not None
    assert copy.tokens.encode("Hallo") == opened.tokens.encode("Hallo")
    (done,) = edit_model(opened.model, parse_edits(["clip(high=1.0, kind='down_proj')"]))
    folder = write_model(opened, tmp_path / "edited", edited=[done])
    matrix = open_model(str(folder), device="cpu").model.model.layers[0].mlp.down_proj.weight.detach()
    s = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(s, done.wanted, atol=float(1e-7 * matrix.norm()))


def test_only_the_chosen_weights_change() -> None:
    """By kind, group, pattern and layer."""
    for text, changed in (
        ("polar(kind='q_proj')", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ("polar(kind='*_proj', layers='1')", {f"model.layers.1.{n}" for n in _LLAMA}),
        ("polar(kind='mlp', layers='0')", {f"model.layers.0.{n}" for n in _LLAMA if n.startswith("mlp")}),
        ("polar(kind='embedding')", {"model.embed_tokens"}),
        ("polar", {f"model.layers.{i}.{n}" for i in (0, 1) for n in _LLAMA}),
    ):
        model = build_small("llama")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        edit_model(model, parse_edits([text]))
        moved = {
            n.removesuffix(".weight") for n, p in model.named_parameters() if not torch.equal(p, before[n])
        }
        assert moved == changed, text


_LLAMA = (
    *(f"self_attn.{k}_proj" for k in "qkvo"),
    *(f"mlp.{k}_proj" for k in ("gate", "up", "down")),
)


def test_tied_weights_stay_tied(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """An edit of the embedding is one of the head, and one tensor is stored."""
    opened = open_model(str(saved("tied")), device="cpu")
    edit_model(opened.model, parse_edits(["keep(k=3, kind='embedding')"]))
    again = open_model(str(write_model(opened, tmp_path / "x")), device="cpu").model
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight  # type: ignore[operator]
    assert int(torch.linalg.matrix_rank(again.get_output_embeddings().weight, rtol=1e-5)) == 3  # type: ignore[operator]


def test_each_expert_is_edited_by_itself() -> None:
    """Each keeps its own largest singular values."""
    model = build_small("mixtral")
    edit_model(model, parse_edits(["keep(k=2, kind='down_proj')"]))
    experts = dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"]
    assert [int(torch.linalg.matrix_rank(e, rtol=1e-4)) for e in experts.detach()] == [2, 2, 2, 2]


def test_no_match_lists_near_names() -> None:
    """And what layers there are."""
    with pytest.raises(UsageError, match=r"near kinds are .*q_proj.*; layers go from 0 to 1"):
        edit_model(build_small("llama"), parse_edits(["polar(kind='q_prj')"]))
    with pytest.raises(UsageError, match="layers='7'"):
        edit_model(build_small("llama"), parse_edits(["polar(layers='7')"]))


def test_nan_is_refused() -> None:
    """Before anything is written."""
    model = build_small("gpt2")
    dict(model.named_parameters())["transformer.h.1.mlp.c_fc.weight"].data[3, 3] = math.inf
    with pytest.raises(UsageError, match=r"h\.1\.mlp\.c_fc\.weight holds 1 values"):
        edit_model(model, parse_edits(["polar"]))


def _opened(kind: str = "llama") -> Opened:
    return Opened(name=kind, model=build_small(kind))


def test_a_model_that_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    """And a folder with something else in it never is."""
    folder = write_model(_opened(), tmp_path / "x")
    with pytest.raises(UsageError, match="--overwrite"):
        write_model(_opened(), folder)
    assert write_model(_opened("gpt2"), folder, overwrite=True) == folder
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="something other than a model"):
        write_model(_opened(), other, overwrite=True)
    assert (other / "chapter.txt").exists()


def test_the_original_is_not_overwritten(saved: Callable[[str], Path]) -> None:
    """Its folder is what is edited."""
    folder = saved("llama")
    with pytest.raises(UsageError, match="is the model that is edited"):
        write_model(open_model(str(folder), device="cpu"), folder, overwrite=True)
    assert (folder / "model.safetensors").exists()


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is needed and what is free."""
    monkeypatch.setattr(editing.shutil, "disk_usage", lambda path: _Usage(10, 9, 1))
    with pytest.raises(UsageError, match=r"needs 0 MB and 0 MB are free|needs .* MB and .* MB are free"):
        write_model(_opened(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the folder nor its half; a model that was there stays."""
    folder = write_model(_opened(), tmp_path / "x")
    before = (folder / "model.safetensors").read_bytes()

    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(editing, "write_json", full)
    with pytest.raises(UsageError, match="no space is left"):
        write_model(_opened("gpt2"), folder, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_killed_write_leaves_no_model_under_the_name(tmp_path: Path) -> None:
    """Killed between the weights and the end."""
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from muonwire.spectra import edit
        from tests.spectra.test_edit import _opened
        edit.write_json = lambda path, value: os.kill(os.getpid(), signal.SIGKILL)
        edit.write_model(_opened(), Path({str(tmp_path / "x")!r}))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    assert write_model(_opened(), tmp_path / "x").is_dir()


def test_what_is_no_transformers_model_cannot_be_written(tmp_path: Path) -> None:
    """Told before anything is computed."""
    with pytest.raises(UsageError, match="no model of transformers"):
        write_model(Opened(name="mine", model=nn.Linear(3, 3)), tmp_path / "x")
