import importlib
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from muonwire.bench import peers
from muonwire.bench import polar as bench
from muonwire.bench.polar_report import summary
from muonwire.cli.bench_polar import BenchPolar, main, run
from muonwire.errors import UsageError
from tests.polar.polar_inputs import gaussian


def test_measures_every_method_in_turns(monkeypatch):
    monkeypatch.setattr(bench, "SHORTEST_TURN_S", 0.0)
    order = []
    table = {"a": lambda x: order.append("a") or bench.torch_muon(x), "b": lambda x: order.append("b") or x}
    rows = bench.measure({"g": gaussian(8, 16)}, table, rounds=2, warmup=0)
    # Two turns and the count of products.
    assert [sorted(order[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
    reference, plain, a, b = rows
    assert [r.method for r in rows] == [*bench.BASELINES, "a", "b"]
    assert reference.ratio == plain.plain_ratio == 1
    assert reference.gflop == plain.gflop == a.gflop > 0
    assert b.polar_error > reference.polar_error
    assert a.speed_over(bench.PLAIN) == a.plain_ratio != a.speed_over(bench.REFERENCE) == a.ratio


def test_slow_methods_sit_out_and_are_compared_in_the_turns_they_took(monkeypatch):
    monkeypatch.setattr(bench, "BUDGET_S", 0.0)
    monkeypatch.setattr(bench, "SHORTEST_TURN_S", 0.0)
    calls = []
    table = {"slow": lambda x: calls.append("slow") or bench.torch_muon(x)}
    reports = []
    (reference, _, slow) = bench.measure(
        {"g": gaussian(8, 16)}, table, rounds=7, warmup=0, progress=reports.append
    )
    # Three turns, and the one that counts its products.
    assert calls == ["slow"] * (bench.FEWEST_TURNS + 1)
    assert reference.ratio == 1
    assert slow.ratio > 0
    assert reports == ["g"]


def test_fast_calls_are_timed_several_in_a_row(monkeypatch):
    monkeypatch.setattr(bench, "SHORTEST_TURN_S", 1e-3)
    calls = []
    bench.measure({"g": gaussian(2, 2)}, {"fast": lambda x: calls.append("fast") or x}, rounds=3)
    assert len(calls) > 100


def test_a_peer_that_is_missing_or_fails_is_left_out(monkeypatch):
    def broken():
        raise OSError("no compiler")

    builders = {
        "works": lambda: lambda x: x,
        "broken": broken,
        "missing": lambda: importlib.import_module("no_such_package"),
        "other shape": lambda: lambda x: x[0],
    }
    monkeypatch.setattr(peers, "BUILDERS", builders)
    assert list(peers.peers()) == ["works"]
    assert "works" in bench.methods()


def test_pareto_front_is_undominated():
    rows = bench.measure(bench.inputs([(16, 32)]), bench.methods(), rounds=1)
    block = [r for r in rows if r.input == "gaussian 16x32"]
    front = bench.pareto_front(block)
    for row in block:
        assert any(f.seconds <= row.seconds and f.polar_error <= row.polar_error for f in front)


def test_summary_is_over_the_named_shapes():
    rows = bench.measure(
        {"gaussian 512x512": gaussian(512, 512)}, {"auto": bench.methods()["auto"]}, rounds=1
    )
    found = summary(rows)
    assert found["square"] == found["all"] > 0
    assert math.isnan(found["wide"])
    assert summary(rows, bench.PLAIN)["square"] not in (found["square"], math.nan)


def test_the_plain_steps_are_those_of_torch():
    for matrix in (gaussian(24, 40), gaussian(40, 24)):
        torch.testing.assert_close(
            bench.plain_steps(matrix), bench.torch_muon(matrix).float(), atol=0.05, rtol=0
        )
    assert bench.plain_steps(torch.zeros(3, 4)).abs().max() == 0


@pytest.mark.parametrize("suffix", [".png", ".html", ".svg"])
def test_command(tmp_path, capsys, suffix):
    save_file({"momentum": gaussian(16, 24).bfloat16()}, tmp_path / "captured.safetensors")
    config = BenchPolar(
        shapes=("8x16",),
        methods=("auto", "svd"),
        captured=tmp_path / "captured.safetensors",
        rounds=1,
        mixed_list=False,
        json=True,
        chart=tmp_path / f"chart{suffix}",
    )
    assert run(config) == 0
    found = json.loads(capsys.readouterr().out)
    assert {m["input"] for m in found["measurements"]} >= {"gaussian 8x16", "momentum"}
    assert found["setting"]["machine"]
    assert set(found["speed_of_auto"]) == set(bench.BASELINES)
    assert (tmp_path / f"chart{suffix}").stat().st_size > 1000


def test_command_line_prints_a_table(capsys):
    threads = torch.get_num_threads()
    args = ["--shapes", "8x16", "--methods", "auto", "--rounds", "1", "--listed", "3", "--no-mixed-list"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "torch.optim.Muon" in out
    assert "3 of 8x16" in out
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "config",
    [
        BenchPolar(shapes=("8",)),
        BenchPolar(methods=("nope",)),
        BenchPolar(rounds=0, shapes=("8x8",)),
    ],
)
def test_bad_input_is_a_usage_error(config):
    with pytest.raises(UsageError):
        run(config)


def test_bad_paths_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="not a file"):
        run(BenchPolar(captured=tmp_path / "none.safetensors"))
    with pytest.raises(UsageError, match="svg"):
        run(BenchPolar(chart=tmp_path / "chart.gif"))
