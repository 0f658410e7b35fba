import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from muonwire import codec
from muonwire.bench import codec as bench
from muonwire.bench.codec_report import as_table
from muonwire.cli import bench_codec
from muonwire.cli.bench_codec import BenchCodec, main, run
from muonwire.errors import UsageError


def gaussian(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (96, 50), (7, 5)])
def test_the_reference_is_the_codec_of_the_same_name(shape):
    """DeMo written plainly gives what "dct(chunk=64) | topk(k=32) | float32" decodes to, from 12 bytes a coefficient."""
    x = gaussian(*shape)
    message = bench.demo_encode(x)
    chosen = codec.parse("dct(chunk=64) | topk(k=32) | float32")
    decoded = chosen.decode(chosen.encode(x))
    # Two orders of summation of at most 64 terms in each of four products.
    assert torch.allclose(bench.demo_decode(message, shape), decoded, atol=4 * 64 * 2**-24 * float(x.norm()))
    grid = chosen.transform.grid(shape)
    assert sum(map(len, message)) == 12 * chosen.select.count(*grid)


def test_errors_and_bits_are_those_of_the_payload():
    x = gaussian(32, 48)
    rows = {r.codec: r for r in bench.measure({"x": x}, ["float32", "sign", "topk(k=4) | sign"], rounds=1)}
    assert list(rows) == [bench.REFERENCE, "float32", "sign(scale=tensor)", "topk(k=4) | sign(scale=tensor)"]
    assert rows["float32"].error == 0
    # The best scale for signs leaves 1 − 2/π of a Gaussian's energy; 1,536 values estimate that within a few per cent.
    assert rows["sign(scale=tensor)"].error == pytest.approx(math.sqrt(1 - 2 / math.pi), rel=0.05)
    for row in list(rows.values())[1:]:
        assert row.num_bytes == len(codec.parse(row.codec).encode(x))
        assert row.bits == 8 * row.num_bytes / x.numel()
        assert row.bits > row.bound_bits
        assert row.encode_mb_s == pytest.approx(4e-6 * x.numel() / row.encode_s)
    assert rows[bench.REFERENCE].encode_ratio == rows[bench.REFERENCE].decode_ratio == 1


def test_the_bound_is_the_number_of_choices():
    chosen = codec.parse("topk(k=2) | sign(scale=row)")
    # Three rows, C(5, 2) = 10 choices in each, and six signs.
    assert bench.entropy_bits(chosen, (3, 5)) == pytest.approx(3 * math.log2(10) + 6)
    assert bench.entropy_bits(codec.parse("bfloat16"), (3, 5)) == 16 * 15


def test_codecs_take_turns(monkeypatch):
    order = []

    def turn(peer, x):
        order.append("reference" if peer is None else str(peer))
        return (*((2.0, 4.0) if peer is None else (1.0, 1.0)), 1, x)

    monkeypatch.setattr(bench, "_turn", turn)
    row = bench.measure({"x": torch.ones(2, 2)}, ["float32", "bfloat16"], rounds=2)[1]
    assert order == ["reference", "float32", "bfloat16"] * 3
    assert (row.encode_ratio, row.decode_ratio) == (2, 4)


def test_every_codec_of_the_list_parses_to_itself():
    assert [str(codec.parse(text)) for text in bench.CODECS] == list(bench.CODECS)
    assert len(set(bench.CODECS)) == len(bench.CODECS)


@pytest.mark.parametrize("suffix", [".png", ".html", ".svg"])
def test_command(tmp_path, capsys, suffix):
    save_file({"momentum": gaussian(16, 24).bfloat16()}, tmp_path / "captured.safetensors")
    config = BenchCodec(
        shapes=("8x16",),
        codecs=("float32", "topk(density=0.1) | sign"),
        captured=tmp_path / "captured.safetensors",
        rounds=1,
        json=True,
        chart=tmp_path / f"chart{suffix}",
    )
    assert run(config) == 0
    found = json.loads(capsys.readouterr().out)
    assert {m["input"] for m in found["measurements"]} == {"momentum", "Gaussian 8x16", "Laplace 8x16"}
    assert found["setting"]["threads"] == 1
    assert (tmp_path / f"chart{suffix}").stat().st_size > 1000


def test_command_line_prints_a_table_of_captured_updates_and_synthetic_ones(capsys, monkeypatch):
    monkeypatch.setattr(bench_codec, "SHAPES", ((8, 16),))
    assert main(["--codecs", "sign", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    for name in ("gradient mlp, 512x192", "change embedding, 256x192", "Laplace 8x16, 8x16", bench.REFERENCE):
        assert name in out


def test_the_table_has_a_line_for_each_measurement():
    rows = bench.measure(bench.inputs([(8, 8), (4, 4)]), ["float32"], rounds=1)
    lines = [line for line in as_table(rows).splitlines() if line.startswith(("  float32", "  DeMo"))]
    assert len(lines) == len(rows) == 8


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (BenchCodec(shapes=("8",)), "takes ROWSxCOLUMNS"),
        (BenchCodec(codecs=("gzip",)), "'gzip' is not a part"),
        (BenchCodec(rounds=0, shapes=("8x8",)), "at least one"),
        (BenchCodec(captured=Path("missing.safetensors")), "capture_updates.py"),
        (BenchCodec(chart=Path("chart.gif")), "svg"),
    ],
)
def test_bad_input_is_a_usage_error(config, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says):
        run(config)
