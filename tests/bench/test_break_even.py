import pytest
import torch

from muonwire.bench import break_even
from muonwire.cli import bench_processor
from muonwire.polar.processor import NEVER, find_processor

EDGES = (8, 16, 32, 64)
# 10⁹ FLOPs per second by edge, as ``measure_rates`` gives them.
RATES = {torch.bfloat16: {256: 4.0}, torch.float16: {256: 1.0}, torch.float32: {256: 1.0}}


@pytest.fixture
def measured_from(monkeypatch):
    """``measure_row`` where the new way of every decision is the faster one from a given short edge on."""

    def measure(edge, rates=RATES):
        def pair(m, n, new, old):
            x = torch.eye(4, 4 * n // m)
            new(x), old(x)
            return (1.0, 2.0) if m >= edge else (2.0, 1.0)

        monkeypatch.setattr(break_even, "SHORT_EDGES", EDGES)
        monkeypatch.setattr(break_even, "BUDGET_S", 0.0)
        monkeypatch.setattr(break_even, "measure_rates", lambda device: break_even.Rates(gflops=rates))
        monkeypatch.setattr(break_even, "_pair", pair)
        names = []
        return break_even.measure_row(progress=names.append), names

    return measure


def test_each_way_pays_from_the_edge_at_which_it_is_faster(measured_from):
    measured, names = measured_from(32)
    row = measured.row
    assert len(names) == break_even.NUM_DECISIONS
    assert row.dtype == torch.bfloat16
    assert row.smallest_half == 32**3
    assert (row.measured_wide, row.measured_square) == (32, 32)
    # A stack of wide matrices, four times as long, is the faster way below that edge.
    assert (row.stacked_wide, row.stacked_square) == (4 * 16**3, 16**3)


def test_a_way_that_never_pays_is_never_taken(measured_from):
    row = measured_from(1000)[0].row
    assert (row.smallest_half, row.measured_wide, row.measured_square) == (1e9, NEVER, NEVER)
    assert row.stacked_square == 64**3
    assert measured_from(1)[0].row.stacked_square == 0


def test_no_16_bit_decision_where_float32_is_fastest(measured_from):
    measured, names = measured_from(32, {dtype: {256: 1.0} for dtype in RATES})
    assert "smallest_half" not in names
    assert measured.row.dtype == torch.float32


def test_the_command_prints_the_measured_row_beside_the_table(measured_from, monkeypatch, capsys):
    measured, _ = measured_from(32)
    monkeypatch.setattr(bench_processor, "measure_row", lambda progress: measured)
    assert bench_processor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    name = find_processor(torch.device("cpu")).name
    assert [line.split() for line in lines if line.startswith("name")] == [["name", name, name]]
    assert any(line.split()[:2] == ["measured_wide", "32"] for line in lines)
    at = lines.index("choice_square: ms as chosen and by the fastest way, by short edge")
    assert [int(line.split()[0]) for line in lines[at + 1 : at + 1 + len(EDGES)]] == list(EDGES)
    assert all(float(ms) > 0 for line in lines[at + 1 : at + 1 + len(EDGES)] for ms in line.split()[1:3])
    assert "  bfloat16   256:      4.0" in lines
