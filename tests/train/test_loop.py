import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.tasks import TextSettings, TextTask
from muonwire.train import TrainConfig, Trainer, checkpoint
from muonwire.train.metrics import METRICS, read_metrics
from muonwire.train.schedule import lr_factor
from muonwire.transport import SingleReplica
from tests.models import LIKE_OTHERS
from tests.slow import slow_unless

# What their optimizers hold goes on bit for bit, which is tested apart; the checkpoint of a run holds it in the same ways.
RESUME_LIKE_OTHERS = (
    "distro",
    "approach_d",
    "approach_f",
    "ef14_muon",
    "local_muon",
    "sparseloco",
    "muonfast",
)

TINY = TextSettings(model_size="pico", sequence=16, batch=2, evaluation_sequences=4)


@pytest.fixture(scope="module")
def task():
    return TextTask(TINY)


def config(**options):
    defaults = {
        "steps": 8,
        "evaluate_every": 4,
        "checkpoint_every": 4,
        "digest_every": 4,
        "task": TINY,
        "lr": 0.01,
    }
    return TrainConfig(**{**defaults, "tensorboard": False, **options})


@pytest.mark.parametrize(
    "recipe",
    slow_unless(
        lambda _, recipe: recipe not in LIKE_OTHERS and recipe not in RESUME_LIKE_OTHERS,
        [(recipe,) for recipe in (*recipes.RECIPES, "one_bit_muon(interval=4, fragments=2, delay=3)")],
    ),
)
def test_a_run_that_was_cut_off_continues_with_bit_identical_losses(recipe, task, tmp_path):
    settings = config(recipe=recipe, steps=9, checkpoint_every=4)
    whole = Trainer(settings, task, SingleReplica(), tmp_path / "whole").run()
    cut = Trainer(settings, task, SingleReplica(), tmp_path / "cut")

    def stop_at_six(progress):
        if progress.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(stop_at_six)
    assert [r["step"] for r in read_metrics(tmp_path / "cut")] == list(range(7))
    torch.manual_seed(999)
    again = Trainer(settings, task, SingleReplica(), tmp_path / "cut")
    assert again.resume()
    assert again.step == 4
    resumed = again.run()
    assert resumed.weights_digest == whole.weights_digest
    assert resumed.final_eval_loss == whole.final_eval_loss
    losses = [
        [(r["step"], r.get("local_loss"), r.get("eval_loss")) for r in read_metrics(tmp_path / d)]
        for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_a_request_to_stop_leaves_a_checkpoint_and_a_readable_folder(task, tmp_path):
    settings = config(steps=20, checkpoint_every=0)
    trainer = Trainer(settings, task, SingleReplica(), tmp_path)
    result = trainer.run(lambda progress: trainer.request_stop() if progress.step == 3 else None)
    assert not result.finished
    assert result.steps == 4
    assert checkpoint.latest(tmp_path).name == "step_00000004"
    assert not (tmp_path / "result.json").exists()


def test_what_a_run_leaves_behind(task, tmp_path):
    settings = config(recipe="local_muon(interval=3)", tensorboard=True)
    result = Trainer(settings, task, SingleReplica(), tmp_path).run()
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 4, 8]
    assert json.loads((tmp_path / "result.json").read_text())["final_eval_loss"] == result.final_eval_loss
    # The peak rate, not what the schedule left of it.
    assert "lr=0.01," in result.optimizer
    assert any((tmp_path / "tensorboard").glob("events.*"))
    shared = load_file(checkpoint.latest(tmp_path) / "model.safetensors")
    model = task.build_model(seed=5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(shared[name])
    total, terms = task.evaluate(model, rank=0, world_size=1)
    assert total / terms == result.final_eval_loss
    assert len(list((tmp_path / "checkpoints").iterdir())) <= 2


def test_a_loss_that_becomes_non_finite_ends_the_run_as_diverged(task, tmp_path):
    settings = config(recipe="muon", lr=1e30, warmup_steps=0, schedule="constant")
    result = Trainer(settings, task, SingleReplica(), tmp_path).run()
    assert result.diverged
    assert result.final_eval_loss is None
    text = (tmp_path / METRICS).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads((tmp_path / "result.json").read_text())["diverged"] is True


def test_a_half_written_metrics_line_is_passed_over(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def finished(task, folder, **options):
    Trainer(config(steps=4, **options), task, SingleReplica(), folder).run()
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": "adamw"}, "config.recipe was 'muon', now 'adamw'"),
        ({"lr": 0.02}, "config.lr was"),
        ({"steps": 5}, "config.steps was 4, now 5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(task, tmp_path, options, says):
    finished(task, tmp_path)
    with pytest.raises(UsageError, match=says):
        Trainer(config(**{"steps": 4, **options}), task, SingleReplica(), tmp_path).resume()


def test_a_checkpoint_of_another_model_is_refused(task, tmp_path):
    finished(task, tmp_path)
    other = TextTask(TextSettings(sequence=16, batch=2, evaluation_sequences=4, model_size="micro"))
    with pytest.raises(UsageError, match="model_size was 'pico', now 'micro'"):
        Trainer(config(steps=4, task=other.settings), other, SingleReplica(), tmp_path).resume()


def test_a_checkpoint_of_another_number_of_replicas_is_refused(task, tmp_path):
    finished(task, tmp_path)
    trainer = Trainer(config(steps=4), task, SingleReplica(), tmp_path)
    trainer.transport.world_size = 3
    with pytest.raises(UsageError, match="written by 1 replicas, this run has 3"):
        trainer.resume()


@pytest.mark.parametrize("damage", ["manifest.json", "rank_0.json", "rank_0.safetensors"])
def test_a_damaged_checkpoint_is_one_clear_error(task, tmp_path, damage):
    finished(task, tmp_path)
    path = checkpoint.latest(tmp_path) / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match=r"checkpoint: .*(cannot be read|is damaged)"):
        Trainer(config(steps=4), task, SingleReplica(), tmp_path).resume()


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    partial = tmp_path / "checkpoints" / "step_00000008.partial"
    partial.mkdir(parents=True)
    (partial / "rank_0.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_00000009").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_trees_of_states_round_trip():
    tree = {
        "state": {0: {"a": torch.ones(2, dtype=torch.bfloat16), "n": 3}},
        "list": [1.5, None, True, "x", {"t": torch.zeros(0)}],
    }
    tensors = {}
    flat = json.loads(json.dumps(checkpoint.flatten(tree, tensors)))
    back = checkpoint.unflatten(flat, tensors)
    assert back["state"][0]["n"] == 3
    assert torch.equal(back["state"][0]["a"], tree["state"][0]["a"])
    assert back["list"][:4] == [1.5, None, True, "x"]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_rise_to_the_peak_and_end_at_the_floor(kind):
    factors = [lr_factor(s, steps=100, warmup_steps=10, kind=kind, floor=0.1) for s in range(1, 101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0, abs=0.01)
    assert factors[9] == 1.0
    assert factors[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": "nonsense"}, "is unknown"),
        ({"recipe": "muon(x=1)"}, "not an option"),
        ({"steps": 0}, "at least 1"),
        ({"lr": 0}, "must be positive"),
        ({"schedule": "zigzag"}, "allowed are cosine"),
        ({"warmup_steps": -1}, "must not be negative"),
    ],
)
def test_bad_settings_say_what_is_allowed(options, says):
    with pytest.raises(UsageError, match=says):
        TrainConfig(**options)
