"""`muonwire spectra` from its arguments to its files."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from muonwire.cli.spectra import main
from muonwire.errors import UsageError
from muonwire.spectra.models import open_model

FEW = [
    "--windows",
    "2",
    "--length",
    "16",
    "--max-tokens",
    "3",
    "--device",
    "cpu",
    "--prompts",
    "In the",
    "Who?",
]


def test_show_edit_and_compare(
    saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as a user would."""
    model, edited = str(saved("llama")), str(tmp_path / "edited")
    assert main(["edit", model, "--edit", "clip(high=1.0)", "drop(k=2, kind='mlp')", "--out", edited]) == 0
    printed = capsys.readouterr().out
    assert "14 matrices edited: clip(high=1.0) then drop(kind='mlp', k=2)" in printed
    assert f"muonwire spectra chat {model} {edited}" in printed

    assert main(["show", model, edited, "--out", str(tmp_path / "show")]) == 0
    printed = capsys.readouterr().out
    assert "q_proj" in printed
    matrices = pl.read_parquet(tmp_path / "show/matrices.parquet")
    assert matrices["model"].unique(maintain_order=True).to_list() == ["llama", "edited"]
    largest = (
        matrices.filter(pl.col("kind") == "q_proj")
        .select("model", "largest", "frobenius")
        .group_by("model")
        .max()
    )
    by = {row["model"]: row["largest"] for row in largest.iter_rows(named=True)}
    assert by["edited"] < by["llama"]
    page = (tmp_path / "show/show.html").read_text()
    assert "Condition number" in page
    assert "model.layers.1.mlp.down_proj.weight" in page
    assert (tmp_path / "show/spectrum-q-proj.png").stat().st_size > 5_000
    values = pl.read_parquet(tmp_path / "show/singular_values.parquet")
    assert len(values) == 2 * 2 * (32 + 16 + 16 + 32 + 32 + 32 + 32) + 2 * 2 * 32

    assert main(["compare", model, edited, "--out", str(tmp_path / "compare"), *FEW]) == 0
    record = json.loads((tmp_path / "compare/compare.json").read_text())
    assert [r["model"] for r in record] == [model, edited]
    assert record[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert record[1]["kl"] > 0
    assert [a["prompt"] for a in record[1]["answers"]] == ["In the", "Who?"]
    page = (tmp_path / "compare/compare.html").read_text()
    assert page.count("&gt; In the") == 2


def test_sweep_writes_its_page_and_table(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Every edit on every kind, and conversations."""
    from muonwire.spectra.sweep import SWEEP

    talk = ["--talk", "polar", "--kinds", "attention", "--out", str(tmp_path / "s")]
    assert main(["sweep", str(saved("tied")), *talk, *FEW]) == 0
    table = pl.read_parquet(tmp_path / "s/sweep.parquet")
    assert len(table) == len(SWEEP)
    assert (table["kl"] >= 0).all()
    page = (tmp_path / "s/sweep.html").read_text()
    assert "Edits of attention weights" in page
    assert "kind=&#39;attention&#39;)" in page
    assert (tmp_path / "s/strength-attention.png").exists()


def test_a_stopped_sweep_goes_on(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is not measured again; a half-written line, other text and another model are."""
    from muonwire.spectra.sweep import SWEEP, Editor

    tried = []
    measure = Editor.tried
    monkeypatch.setattr(
        Editor, "tried", lambda self, edit, how: (tried.append(str(edit)), measure(self, edit, how))[1]
    )
    args = ["--talk", "--kinds", "attention", "--out", str(tmp_path / "s"), *FEW]
    assert main(["sweep", str(saved("tied")), *args]) == 0
    assert len(tried) == len(SWEEP)
    first = pl.read_parquet(tmp_path / "s/sweep.parquet")
    journal = tmp_path / "s/sweep.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:-2], lines[-2][:40]]))
    tried.clear()
    assert main(["sweep", str(saved("tied")), *args]) == 0
    assert tried == [str(json.loads(line)["edit"]) for line in lines[-2:]]
    assert pl.read_parquet(tmp_path / "s/sweep.parquet").equals(first)
    tried.clear()
    assert main(["sweep", str(saved("tied")), *args]) == 0
    assert not tried
    assert main(["sweep", str(saved("tied")), *args, "--length", "17"]) == 0
    assert len(tried) == len(SWEEP)
    tried.clear()
    assert main(["sweep", str(saved("gpt2")), *args]) == 0
    assert len(tried) == len(SWEEP)


def test_a_dtype_is_what_is_written(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """And an unknown one is refused."""
    out = str(tmp_path / "half")
    assert main(["edit", str(saved("gpt2")), "--out", out, "--dtype", "bfloat16"]) == 0
    assert next(open_model(out, device="cpu").model.parameters()).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="dtype is 'half'; allowed are float32"):
        main(["edit", str(tmp_path / "gpt2"), "--out", str(tmp_path / "x"), "--dtype", "half"])
    with pytest.raises(UsageError, match="device is 'gpu'"):
        main(["show", str(tmp_path / "gpt2"), "--device", "gpu"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["look"], "'look' is not an action; allowed are show, edit, compare, sweep, chat"),
        (["show"], "0 models are named; at least 1"),
        (["compare", "one"], "1 models are named; at least 2"),
        (["edit"], "0 models are named"),
        (["chat"], "0 models are named"),
        (["edit", "x", "--edit", "blur"], "'blur' is unknown; allowed are clip"),
        (["show", "./nowhere"], "is not there"),
    ],
)
def test_bad_input_is_refused(args: list[str], message: str) -> None:
    """Before anything is opened or written."""
    with pytest.raises(UsageError, match=message):
        main(args)


def test_help_tells_the_actions(capsys: pytest.CaptureFixture[str]) -> None:
    """With examples."""
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed
    for action in ("show", "edit", "compare", "sweep", "chat"):
        assert f"  {action}" in printed
