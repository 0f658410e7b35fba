"""What a probe measures, against the definitions written out, and that measuring changes nothing."""

import json
import math
import warnings
from dataclasses import asdict

import pytest
import torch

from muonwire import recipes
from muonwire.codec import parse
from muonwire.tasks import TextSettings, TextTask
from muonwire.train import TrainConfig, Trainer
from muonwire.train.diagnostics import MEASURES, Diagnostics
from muonwire.train.metrics import read_metrics
from muonwire.transport import ProcessGroupTransport, SingleReplica
from tests.models import RECIPE_OPTIONS, SmallNet, batch, loss, train
from tests.replicas import run_replicas

TINY = TextSettings(sequence=16, batch=2, evaluation_sequences=4, model_size="pico")
HIDDEN = ("up.weight", "down.weight")


def _settings(recipe, **options):
    defaults = {
        "steps": 8,
        "evaluate_every": 4,
        "checkpoint_every": 3,
        "digest_every": 4,
        "tensorboard": False,
    }
    return TrainConfig(recipe=recipe, lr=0.01, task=TINY, **{**defaults, **options})


def _steps(name, steps, transport, **options):
    """Train the small net under one probe at the end; gradients, momenta and weights of the last step, and the figures."""
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
    diagnostics = Diagnostics(model, optimizer, transport, steps=steps, probes=1)
    params = dict(model.named_parameters())
    averages = {n: torch.zeros_like(params[n]) for n in HIDDEN}
    start = {n: params[n].detach().clone() for n in HIDDEN}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model, batch(step, transport.rank, transport.world_size)).backward()
        before = {n: params[n].detach().clone() for n in HIDDEN}
        for n, v in averages.items():
            v.mul_(0.95).add_(0.05 * params[n].grad)
        momenta = {n: 0.95 * averages[n] + 0.05 * params[n].grad for n in HIDDEN}
        diagnostics.observe(step)
        optimizer.step()
    local = optimizer.local is not None
    change = {n: params[n].detach() - (start if local else before)[n] for n in HIDDEN}
    return diagnostics.measure(), momenta, change


def _by_definition(by_rank, held):
    """Alignment, effective rank and disagreement from all replicas' momenta and one's change of the shared weights."""
    momenta, change = [m for _, m, _ in by_rank], by_rank[0][2]
    cosines, ranks = [], []
    for n in HIDDEN:
        mean = sum(m[n] for m in momenta) / len(momenta)
        u, values, vh = torch.linalg.svd(mean, full_matrices=False)
        # The norm behind ``down`` leaves one direction of it without a gradient.
        u = u * (values > 1e-5 * values[0])
        cosines.append(torch.nn.functional.cosine_similarity(change[n].flatten(), -(u @ vh).flatten(), dim=0))
        p = torch.linalg.svdvals(change[n])
        p = p / p.sum()
        ranks.append(math.exp(-(p * p.log()).sum()) / len(p))
    vectors = torch.stack([torch.cat([h[n].flatten() for n in HIDDEN]) for h in held])
    mean = vectors.mean(0)
    apart = (vectors - mean).square().sum(1).mean().sqrt() / mean.norm()
    return [float(sum(cosines)) / 2, sum(ranks) / 2, float(apart)]


def _replicated(name, steps, options):
    return _steps(name, steps, ProcessGroupTransport(), **options)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["muon", "approach_a"])
def test_the_figures_of_a_step_are_those_of_the_definition(name, world_size):
    by_rank = run_replicas(_replicated, world_size, name, 3, {})
    figures = by_rank[0][0]
    assert all(f == figures for f, _, _ in by_rank)
    expected = _by_definition(by_rank, held=[m for _, m, _ in by_rank])
    assert [figures[m] for m in MEASURES[:3]] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (figures["kept_over_sent"] is None) == (name == "muon")


def _local(interval):
    """A replica's own change, by training it alone, beside what it and the others come to together."""
    transport = ProcessGroupTransport()
    options = {"interval": interval, "codec": "float32", "vector_codec": "float32"}
    together = _steps("local_muon", interval, transport, **options)

    class Alone(SingleReplica):
        """Its batches are those of its place among the others."""

    alone = Alone()
    model = SmallNet()
    optimizer = recipes.build("local_muon", model, lr=0.01, transport=alone, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in HIDDEN}
    for step in range(1, interval + 1):
        optimizer.zero_grad()
        loss(model, batch(step, transport.rank, transport.world_size)).backward()
        optimizer.step()
    return together, {n: before[n] - p.detach() for n, p in model.named_parameters() if n in HIDDEN}


def test_with_local_steps_replicas_disagree_by_their_weight_changes():
    results = run_replicas(_local, 2, 3)
    by_rank = [together for together, _ in results]
    figures = by_rank[0][0]
    expected = _by_definition(by_rank, held=[own for _, own in results])
    assert [figures[m] for m in MEASURES[:3]] == pytest.approx(expected, rel=1e-4)
    assert figures["disagreement"] > 0.01
    # Nothing is dropped where nothing is selected or quantized.
    assert figures["kept_over_sent"] == 0.0


def test_kept_over_sent_is_what_the_codec_drops_over_what_it_leaves():
    text = "topk(density=0.25) | sign(scale=row)"
    figures, _, _ = _steps("local_muon", 1, SingleReplica(), interval=1, codec=text, vector_codec="float32")
    model = SmallNet()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, recipes.build("muon", model, lr=0.01), 1, start=1)
    kept = sent = 0.0
    for n, p in model.named_parameters():
        change = before[n] - p.detach()
        decoded = parse(text).decode(parse(text).encode(change)) if p.ndim == 2 else change
        kept += float((change - decoded).square().sum())
        sent += float(decoded.square().sum())
    assert figures["kept_over_sent"] == pytest.approx(math.sqrt(kept / sent), rel=1e-4)


def test_dense_muon_moves_along_its_own_direction_and_replicas_alone_do_not_disagree():
    figures, _, _ = _steps("muon", 3, SingleReplica(), weight_decay=0.0, method="svd")
    assert figures["alignment"] == pytest.approx(1.0, abs=1e-5)
    # One direction of ``down`` has no gradient, because of the norm behind it.
    assert figures["effective_rank"] == pytest.approx((1 + 7 / 8) / 2, abs=1e-3)
    assert figures["disagreement"] == 0.0


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_every_recipe_can_be_probed(name):
    figures, _, _ = _steps(name, 30, SingleReplica(), **RECIPE_OPTIONS.get(name, {}))
    assert tuple(figures) == MEASURES
    assert -1.0 <= figures["alignment"] <= 1.0 + 1e-6
    assert 0.0 < figures["effective_rank"] <= 1.0 + 1e-6


def _with_and_without(recipes_, folder):
    transport_rank = ProcessGroupTransport().rank
    task = TextTask(TINY)
    results = []
    for recipe in recipes_:
        for probes in (4, 0):
            path = folder / f"{recipe}-{probes}"
            result = Trainer(_settings(recipe, probes=probes), task, ProcessGroupTransport(), path).run()
            results.append((asdict(result), read_metrics(path) if transport_rank == 0 else None))
    return results


def test_measuring_changes_neither_weights_nor_bytes(tmp_path):
    names = ["muon", "distro", "local_muon(interval=3)"]
    by_rank = run_replicas(_with_and_without, 2, names, tmp_path)
    for i in range(0, len(by_rank[0]), 2):
        (probed, metrics), (plain, _) = by_rank[0][i], by_rank[0][i + 1]
        timed = {k for k in probed if k.endswith("_s_per_step")}
        assert plain["diagnostics"] == {}
        assert {k: v for k, v in probed.items() if k not in timed | {"diagnostics"}} == {
            k: v for k, v in plain.items() if k not in timed | {"diagnostics"}
        }
        assert all(rank[i][0]["diagnostics"] == probed["diagnostics"] for rank in by_rank)
        measured = [r for r in metrics if "alignment" in r]
        local = probed["config"]["recipe"].startswith("local_muon")
        # The last synchronization is the one that ends the run, after two of three steps.
        assert [r["step"] for r in measured] == ([3, 6, 8] if local else [2, 4, 6, 8])
        for name in MEASURES[:3]:
            assert probed["diagnostics"][name] == pytest.approx(
                sum(r[name] for r in measured) / len(measured)
            )
        assert probed["diagnostics"]["disagreement"] > 0.0


@pytest.mark.parametrize("recipe", ["approach_a", "local_muon(interval=4)"])
def test_a_resumed_run_measures_what_an_undisturbed_one_does(recipe, tmp_path):
    task = TextTask(TINY)
    whole = Trainer(_settings(recipe), task, SingleReplica(), tmp_path / "whole").run()
    cut = Trainer(_settings(recipe), task, SingleReplica(), tmp_path / "cut")

    def stop_at_five(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(stop_at_five)
    again = Trainer(_settings(recipe), task, SingleReplica(), tmp_path / "cut")
    assert again.resume()
    resumed = again.run()
    assert resumed.diagnostics == whole.diagnostics
    figures = [[[r.get(m) for m in MEASURES] for r in read_metrics(tmp_path / d)] for d in ("whole", "cut")]
    assert figures[0] == figures[1]


def test_a_checkpoint_without_probes_is_read_and_probing_begins_there(tmp_path):
    task = TextTask(TINY)
    Trainer(_settings("muon", steps=8, probes=0), task, SingleReplica(), tmp_path).run()
    tree = next(tmp_path.glob("checkpoints/step_00000006/rank_0.json"))
    part = json.loads(tree.read_text())
    part["state"]["$dict"] = [entry for entry in part["state"]["$dict"] if entry[0] != "diagnostics"]
    tree.write_text(json.dumps(part))
    for newer in tmp_path.glob("checkpoints/step_00000008/manifest.json"):
        newer.unlink()
    trainer = Trainer(_settings("muon", steps=8, probes=4), task, SingleReplica(), tmp_path)
    assert trainer.resume()
    assert trainer.step == 6
    trainer.run()
    assert [r["step"] for r in read_metrics(tmp_path) if "alignment" in r] == [8]


def _warnings(name, spread):
    """What two replicas are warned of whose gradients are, by ``spread``, of one direction or of opposite ones."""
    transport = ProcessGroupTransport()
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport)
    steps = 4 * (optimizer.local.interval if optimizer.local else 1)
    diagnostics = Diagnostics(model, optimizer, transport, steps=steps, probes=4)
    generator = torch.Generator().manual_seed(0)
    common = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    own = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, steps + 1):
            for n, p in model.named_parameters():
                p.grad = common[n] + spread * (1 - 2 * transport.rank) * own[n]
            diagnostics.observe(step)
            optimizer.step()
            diagnostics.measure()
    return [str(w.message) for w in caught if "point apart" in str(w.message)]


@pytest.mark.parametrize(
    ("name", "spread", "warned"), [("local_muon", 4.0, 1), ("local_muon", 0.5, 0), ("muon", 4.0, 0)]
)
def test_replicas_whose_local_changes_oppose_each_other_are_told_of_once(name, spread, warned):
    first, second = run_replicas(_warnings, 2, name, spread)
    assert (len(first), second) == (warned, [])
    for said in first:
        assert said.startswith("step ")
        assert "= 1.00 at 2 replicas" in said
        assert "give all of them mixed data" in said
