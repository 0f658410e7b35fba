"""Run by test_add.py against a copy of the package to which the examples of docs/add.md were added."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from muonwire import codec, recipes, stages
from muonwire.cli.main import main
from muonwire.codec.text import PARTS
from muonwire.compare.report import compare_page, read_results
from muonwire.compare.report.page import CHARTS
from muonwire.errors import PayloadError, UsageError
from muonwire.pages import render_page, write_png
from muonwire.spectra.models import open_model
from muonwire.tasks import TASKS, settings_type
from muonwire.train import TrainConfig
from muonwire.train.metrics import read_metrics
from muonwire.transport import run_threads
from tests.codec import test_codecs
from tests.compare.report.made_comparisons import FOUR, make_results, make_setting
from tests.models import SmallNet, loss, train, weights
from tests.stages import test_stages

TEXTS = [
    "power",
    "topk(density=0.3) | power",
    "dct(chunk=8) | topk(k=2) | power",
    "hadamard(block=8) | power",
]


def command(*args):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert not stop.value.code


@pytest.mark.parametrize("text", TEXTS)
def test_codec_part(text):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        test_codecs.test_every_codec_takes_every_shape(text, dtype)
    for shape in ((64, 96), (512, 128), (7,)):
        test_codecs.test_the_estimate_is_near_the_real_size(text, shape)
    test_codecs.test_the_textual_form_round_trips(text)


def test_codec_part_keeps_its_word():
    chosen = codec.parse("power")
    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9)
    ratio = x / chosen.decode(chosen.encode(x))
    assert ((ratio >= 1) & (ratio < 2)).all()
    with pytest.raises(PayloadError, match="below"):
        chosen.decode_body(bytes(210), (7, 30))
    with pytest.raises(PayloadError, match="take 210"):
        chosen.decode_body(bytes(209), (7, 30))


def test_stage():
    from muonwire.stages.clip_norm import ClipNorm

    stage = ClipNorm()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        test_stages.test_every_stage_keeps_shapes_dtypes_and_its_inputs(stage, dtype)
    test_stages.test_every_stage_is_deterministic_and_all_it_remembers_is_its_state(stage)
    test_stages.test_every_stage_turns_zeros_into_zeros(stage)
    assert str(stages.chain(stages.Mean(), stage)) == "mean → clip_norm(factor=2.0, decay=0.9)"
    param, states = torch.zeros(4), [stage.init(torch.zeros(4))]
    lengths = [
        float(stage.apply([torch.full((4,), size)], [param], states, test_stages.context(1))[0].norm())
        for size in (0.5, 5.0, 0.5)
    ]
    # The second one is cut to twice the first, whose length is the mean so far.
    assert lengths == pytest.approx([1.0, 2.0, 1.0])
    assert float(states[0]["norm"]) == pytest.approx(0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 1.0)


def test_recipe_on_two_replicas():
    """Bit-identical weights, a falling loss, and as many bytes as the optimizer estimated."""

    def replica(rank, make_transport):
        model = SmallNet()
        transport = make_transport()
        optimizer = recipes.power_muon(model, lr=0.02, clip=3.0, transport=transport)
        losses = train(model, optimizer, 12, rank=rank, world_size=2)
        assert "clip_norm(factor=3.0" in str(optimizer)
        assert "topk(density=0.05) | power" in str(optimizer)
        sent = transport.meter.training.sent_bytes / 12
        return losses, weights(model), sent, optimizer.estimate_bytes(replicas=2)

    (first, own, sent, estimate), (second, others, *_) = run_threads(replica, replicas=2)
    assert all(torch.equal(own[name], others[name]) for name in own)
    assert sum(first[-3:] + second[-3:]) < sum(first[:3] + second[:3])
    assert 0 < sent == pytest.approx(estimate, rel=0.3)
    model = SmallNet()
    assert loss(model, torch.zeros(2, 3, dtype=torch.long)).isfinite()


def test_task(tmp_path, capsys):
    settings = TASKS["primes"](batch=6)
    task = settings.make()
    parts = [task.batch(seed=1, step=5, rank=r, world_size=4) for r in range(4)]
    joined = TASKS["primes"](batch=24).make().batch(seed=1, step=5, rank=0, world_size=1)
    assert all(torch.equal(torch.cat([p[name] for p in parts]), joined[name]) for name in joined)
    model = task.build_model(seed=0)
    whole, terms = task.evaluate(model, rank=0, world_size=1)
    shares = [task.evaluate(model, rank=r, world_size=3) for r in range(3)]
    assert terms == 128 == sum(t for _, t in shares)
    assert sum(s for s, _ in shares) == pytest.approx(whole, rel=1e-5)
    assert TASKS["primes"].read(json.loads(json.dumps(settings.identity()))) == settings

    out = tmp_path / "run"
    more = ("--width", 48, "--evaluate-every", 20, "--no-tensorboard", "--out", out)
    command("train", "--task", "primes", "--recipe", "power_muon", "--steps", 60, *more)
    assert "recipe" in json.loads((out / "result.json").read_text())["config"]
    evaluated = [r["eval_loss"] for r in read_metrics(out) if "eval_loss" in r]
    assert evaluated[-1] < 0.8 * evaluated[0]
    command("train", "--task", "primes", "--recipe", "power_muon", "--steps", 70, *more, "--resume")
    assert open_model(str(out)).tokens is None
    capsys.readouterr()


def test_task_compared(tmp_path, capsys):
    command(
        *("compare", "--task", "primes(bits=9)", "--recipes", "muon", "power_muon", "--lr-grid", 0.01),
        *("--seeds", 0, "--replicas", 1, "--steps", 8, "--out", tmp_path),
    )
    assert "power_muon" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "telling the prime numbers below 512 from their binary digits" in page
    assert "MLP of width 32" in page
    assert "32 numbers per step" in page
    config = json.loads(next(tmp_path.glob("runs/muon/*/config.json")).read_text())
    assert config["task"] == {"bits": 9, "width": 32, "batch": 32}


def test_claim(tmp_path, capsys):
    rows = Path(os.environ["ADDED_CLAIM"])
    command(*("lab", "run", "rows.1", "--claims-from", rows, "--out", tmp_path, "--jobs", 1, "--quick"))
    assert "rows.1: confirmed" in capsys.readouterr().out


def test_chart(tmp_path):
    page = compare_page(setting=make_setting(), results=read_results(*make_results()))
    (section,) = [s for s in page.sections if s.title == "Loss"]
    chart = section.blocks[-1]
    assert (chart.name, chart.title) == ("loss_by_messages", "Loss by messages")
    assert [entry.label for entry in chart.key] == [made.recipe for made in FOUR]
    assert write_png(chart, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert "Loss by messages" in render_page(page)


def test_from_outside(tmp_path, monkeypatch, capsys):
    """Import paths instead of lines in tables."""
    (tmp_path / "mine.py").write_text(
        "from muonwire.recipes.power_muon import power_muon\nfrom muonwire.tasks.primes import PrimesSettings\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe, out = "mine.power_muon(clip=4.0)", tmp_path / "run"
    monkeypatch.delitem(TASKS, "primes")
    monkeypatch.delitem(recipes.RECIPES, "power_muon")
    command(
        "train",
        "--task",
        "mine.PrimesSettings",
        "--width",
        16,
        "--recipe",
        recipe,
        "--steps",
        3,
        "--out",
        out,
    )
    assert "clip_norm(factor=4.0" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["config"]["recipe"] == recipe
    with pytest.raises(UsageError, match=r"of the task 'primes'.*muonwire\.tasks\.TASKS"):
        open_model(str(out))
    # A replica's process is given the settings like this.
    config = TrainConfig(recipe=recipe, task=settings_type("mine.PrimesSettings")(width=16))
    assert pickle.loads(pickle.dumps(config)) == config


def test_tables_are_plain_dicts(monkeypatch):
    """What a program adds to them counts as their lines do."""
    part, chart = PARTS["power"], CHARTS["LOSS_BY_MESSAGES"]
    monkeypatch.delitem(PARTS, "power")
    monkeypatch.delitem(CHARTS, "LOSS_BY_MESSAGES")
    results = read_results(*make_results())
    with pytest.raises(UsageError, match="'power' is not a part"):
        codec.parse("power")
    assert "loss_by_messages" not in [
        c.name for c in compare_page(setting=make_setting(), results=results).charts
    ]
    monkeypatch.setitem(PARTS, "power", part)
    monkeypatch.setitem(CHARTS, "loss_by_messages", chart)
    assert str(codec.parse("power")) == "power"
    assert "loss_by_messages" in [
        c.name for c in compare_page(setting=make_setting(), results=results).charts
    ]
