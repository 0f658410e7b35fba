"""Runs that a resume makes longer or shorter."""

import dataclasses
import json

import pytest
import torch

from muonwire.errors import UsageError
from muonwire.train import TrainConfig, Trainer, checkpoint, train
from muonwire.train.lengths import Length, extend, lengths_of, rate_change
from muonwire.train.metrics import read_metrics
from muonwire.train.schedule import lr_factor
from muonwire.train.single import train_here
from muonwire.transport import SingleReplica
from tests.lockstep import lockstep
from tests.tiny_task import TinySettings

TINY = TinySettings(sequence=16, batch=2, evaluation_sequences=4)
RECORDED = ("step", "lr", "local_loss")
EVALUATED = ("eval_loss", "train_loss")


@pytest.fixture(scope="module")
def task():
    return TINY.make()


def config(**options):
    defaults = {"steps": 20, "schedule": "constant", "warmup_steps": 2, "evaluate_every": 4, "probes": 0}
    return TrainConfig(**{**defaults, "tensorboard": False, "task": TINY, **options})


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_to(steps, settings, task, folder, *, world_size=1, on_progress=None):
    """The first replica's result after a resume of what is in the folder."""

    def replica(transport):
        trainer = Trainer(dataclasses.replace(settings, steps=steps), task, transport, folder)
        trainer.resume(new_length=True)
        return trainer.run(None if on_progress is None else lambda progress: on_progress(trainer, progress))

    return lockstep(replica, world_size)[0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("recipe", "first"),
    [
        ("muon", 10),
        ("distro(k=4)", 10),
        ("psyche", 10),
        ("one_bit_muon(interval=4)", 8),
        ("local_muon(interval=5)", 10),
    ],
)
def test_a_longer_run_of_constant_rate_is_the_undisturbed_one(recipe, first, world_size, task, tmp_path):
    settings = config(recipe=recipe)
    whole = run_to(20, settings, task, tmp_path / "whole", world_size=world_size)
    run_to(first, settings, task, tmp_path / "longer", world_size=world_size)
    torch.manual_seed(999)
    longer = run_to(20, settings, task, tmp_path / "longer", world_size=world_size)
    assert longer.weights_digest == whole.weights_digest
    assert longer.final_eval_loss == whole.final_eval_loss
    # Who resumes agrees on the groups once more, and the lengths of frames are guessed anew.
    assert longer.bytes_sent_per_step == pytest.approx(whole.bytes_sent_per_step, abs=64)
    expected, found = (read_metrics(tmp_path / name) for name in ("whole", "longer"))
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert [one.get(key) for key in RECORDED] == [other.get(key) for key in RECORDED]
        # The last step of the shorter run was evaluated too.
        if one["step"] % 4 == 0:
            assert [one.get(key) for key in EVALUATED] == [other.get(key) for key in EVALUATED]


def synchronized(folder):
    """The steps after which bytes had been sent."""
    sent = [record["sent_bytes"] for record in read_metrics(folder)]
    return [step for step in range(1, len(sent)) if sent[step] > sent[step - 1]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_local_steps_synchronize_once_more_at_the_end_of_the_shorter_run(world_size, task, tmp_path):
    settings = config(recipe="one_bit_muon(interval=4)")

    def synchronize(trainer, progress):
        if progress.step == 10:
            trainer.optimizer.synchronize()

    oracle = run_to(20, settings, task, tmp_path / "oracle", world_size=world_size, on_progress=synchronize)
    whole = run_to(20, settings, task, tmp_path / "whole", world_size=world_size)
    run_to(10, settings, task, tmp_path / "longer", world_size=world_size)
    longer = run_to(20, settings, task, tmp_path / "longer", world_size=world_size)
    assert longer.weights_digest == oracle.weights_digest != whole.weights_digest
    assert longer.final_eval_loss == oracle.final_eval_loss
    if world_size > 1:
        assert synchronized(tmp_path / "whole") == [4, 8, 12, 16, 20]
        assert synchronized(tmp_path / "longer") == [4, 8, 10, 14, 18, 20]
    after = [
        [r["local_loss"] for r in read_metrics(tmp_path / d) if r["step"] > 10] for d in ("oracle", "longer")
    ]
    assert after[0] == after[1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_follows_the_schedule_of_the_new_length(schedule, task, tmp_path):
    settings = config(schedule=schedule, lr=0.01)
    for steps in (5, 8, 12):
        run_to(steps, settings, task, tmp_path)
    ends = {
        **dict.fromkeys(range(1, 6), 5),
        **dict.fromkeys(range(6, 9), 8),
        **dict.fromkeys(range(9, 13), 12),
    }
    expected = [
        0.01 * lr_factor(step, steps=steps, warmup_steps=2, kind=schedule, floor=0.1)
        for step, steps in ends.items()
    ]
    assert [r["lr"] for r in read_metrics(tmp_path)[1:]] == expected


def test_the_history_is_in_the_settings_the_checkpoint_and_the_result(task, tmp_path, capsys):
    for steps in (3, 5):
        train(config(steps=steps), tmp_path, resume=steps > 3, threads=1)
    lengths = [{"steps": 3, "first_step": 1}, {"steps": 5, "first_step": 4}]
    manifest = json.loads((checkpoint.latest(tmp_path) / "manifest.json").read_text())
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["steps"] == 5
    assert settings["lengths"] == lengths
    assert manifest["identity"]["config"] == settings
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["config"] == settings
    assert result["steps"] == 5
    assert "the rate" not in capsys.readouterr().out
    # What has to be one run, such as one of a comparison, does not take it.
    with pytest.raises(UsageError, match=r"config\.lengths was"):
        Trainer(config(steps=5), task, SingleReplica(), tmp_path).resume()
    # The same steps again tell the result again.
    train(config(steps=5), tmp_path, resume=True, threads=1)
    assert "step 5: evaluation loss" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == settings
    assert json.loads((tmp_path / "result.json").read_text())["weights_digest"] == result["weights_digest"]


def test_a_run_that_was_never_changed_has_no_history(tmp_path):
    train(config(steps=2), tmp_path, threads=1)
    assert "lengths" not in json.loads((tmp_path / "config.json").read_text())
    assert "lengths" not in json.loads((tmp_path / "result.json").read_text())["config"]


def test_a_line_tells_what_becomes_of_the_rate(tmp_path, capsys):
    settings = config(steps=4, schedule="linear", warmup_steps=0, lr=0.01)
    train(settings, tmp_path, threads=1)
    train(dataclasses.replace(settings, steps=7), tmp_path, resume=True, threads=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the rate")]
    assert lines == [
        "the rate follows the linear schedule of 7 steps from step 5 on: 0.004 in step 5, 0.001 in step 7; "
        "so far that of 4, 0.001 in step 4"
    ]


@pytest.mark.parametrize(("first", "told"), [(3, True), (4, False)])
def test_local_steps_tell_of_a_synchronization_that_no_longer_run_has(first, told, tmp_path, capsys):
    settings = config(recipe="local_muon(interval=2)", steps=first)
    train(settings, tmp_path, threads=1)
    train(dataclasses.replace(settings, steps=6), tmp_path, resume=True, threads=1)
    assert (f"the replicas synchronized after step {first}" in capsys.readouterr().out) == told


def test_a_run_that_goes_on_has_no_result_until_it_is_finished(task, tmp_path, monkeypatch):
    train(config(steps=2), tmp_path, threads=1)

    def fall(trainer):
        assert not (tmp_path / "result.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_one_step", fall)
    with pytest.raises(KeyboardInterrupt):
        train(config(steps=4), tmp_path, resume=True, threads=1)
    monkeypatch.undo()
    train(config(steps=4), tmp_path, resume=True, threads=1)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 2}, "steps is 2, but 4 of the run's 4 steps are done; give 4 .* a number above 4"),
        ({"steps": 5}, r"from step 5 on the linear schedule .* has the rate 0, .* give more steps"),
        ({"steps": 8, "lr": 0.5}, r"config\.lr was"),
        ({"steps": 8, "evaluate_every": 2}, r"config\.evaluate_every was"),
    ],
)
def test_a_refused_length_changes_no_file(options, says, tmp_path):
    settings = config(steps=4, schedule="linear", lr_floor=0.0)
    train(settings, tmp_path, threads=1)
    before = files(tmp_path)
    with pytest.raises(UsageError, match=says):
        train(dataclasses.replace(settings, **options), tmp_path, resume=True, threads=1)
    assert files(tmp_path) == before


def test_a_finished_run_without_a_checkpoint_is_not_replaced_by_a_longer_one(tmp_path):
    settings = config(steps=2, checkpoint_every=0)
    train(settings, tmp_path, threads=1)
    before = files(tmp_path)
    with pytest.raises(UsageError, match="left no checkpoint to go on from"):
        train(dataclasses.replace(settings, steps=4), tmp_path, resume=True, threads=1)
    assert files(tmp_path) == before


def test_replicas_that_would_resume_unlike_are_refused_together(task, tmp_path):
    run_to(2, config(), task, tmp_path, world_size=2)
    before = files(tmp_path)

    def replica(transport):
        with pytest.raises(UsageError, match=r"replica 0: step 2 of 4; replica 1: step 2 of 6"):
            train_here(config(steps=4 + 2 * transport.rank), tmp_path, transport, resume=True)

    lockstep(replica, 2)
    assert files(tmp_path) == before


def test_a_stopped_run_may_be_made_shorter():
    settings = config(steps=6)
    assert extend([Length(steps=20)], settings, done=5) == (Length(steps=20), Length(steps=6, first_step=6))
    with pytest.raises(UsageError, match="steps is 6, but 6 of the run's 20 steps are done; give 20"):
        extend([Length(steps=20)], settings, done=6)


def test_lengths_are_read_back():
    both = (Length(steps=20), Length(steps=6, first_step=6))
    saved = json.loads(json.dumps({"steps": 6, "lengths": [dataclasses.asdict(length) for length in both]}))
    assert lengths_of(saved) == both
    assert lengths_of({"steps": 20}) == (Length(steps=20),)


@pytest.mark.parametrize(
    ("options", "done", "told"),
    [
        ({"schedule": "constant"}, 10, False),
        ({"schedule": "cosine", "warmup_steps": 10}, 10, False),
        ({"schedule": "linear", "warmup_steps": 10}, 10, False),
        ({"schedule": "linear", "warmup_steps": 10}, 11, True),
        ({"schedule": "cosine", "lr_floor": 1.0}, 12, False),
        ({"schedule": "cosine", "warmup_steps": 0}, 1, False),
        ({"schedule": "cosine", "warmup_steps": 0}, 2, True),
    ],
)
def test_nothing_is_told_where_the_past_rates_are_those_of_the_new_length(options, done, told):
    lengths = (Length(steps=15), Length(steps=20, first_step=done + 1))
    assert (rate_change(lengths, config(**options)) is not None) == told


def test_every_earlier_length_is_told():
    lengths = (Length(steps=4), Length(steps=6, first_step=5), Length(steps=7, first_step=7))
    line = rate_change(lengths, config(schedule="linear", warmup_steps=0, steps=7, lr=0.01))
    assert line == (
        "the rate follows the linear schedule of 7 steps from step 7 on: 0.001 in step 7; "
        "so far that of 4, 0.001 in step 4, then that of 6, 0.001 in step 6"
    )
