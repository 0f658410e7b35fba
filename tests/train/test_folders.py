"""Replicas with folders of their own: what a checkpoint is, which one they go on from, and what one gets from another."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from muonwire.errors import ReplicaLostError, UsageError
from muonwire.train import TrainConfig, Trainer, checkpoint, single
from muonwire.train.folders import Together
from muonwire.train.metrics import read_metrics
from muonwire.train.single import train_here
from muonwire.transport import run_threads
from tests.lockstep import lockstep
from tests.tiny_task import TinySettings

TINY = TinySettings(sequence=16, batch=2, evaluation_sequences=4)


@pytest.fixture(scope="module")
def task():
    return TINY.make()


def config(**options):
    defaults = {
        "recipe": "one_bit_muon(interval=4)",
        "steps": 9,
        "evaluate_every": 4,
        "checkpoint_every": 2,
        "task": TINY,
        "lr": 0.01,
    }
    return TrainConfig(**{**defaults, "tensorboard": False, **options})


def folder_of(base, rank, *, shared=False):
    return base / ("all" if shared else f"host{rank}")


class CutError(Exception):
    """Ends a run in the test's place of choice, as a kill would."""


def run(task, base, *, replicas=2, resume=False, shared=False, until=None, before=None, **options):
    """A run of replicas with folders of their own; returns rank 0's trainer and result.

    ``until``: all end after this step. ``before(trainer)`` is called on each replica before it trains.
    """

    def replica(transport):
        trainer = Trainer(config(**options), task, transport, folder_of(base, transport.rank, shared=shared))
        if resume:
            assert trainer.resume()
        if before is not None:
            before(trainer)

        def stop(progress):
            if progress.step == until:
                raise CutError

        try:
            result = trainer.run(stop)
        except CutError:
            return trainer, None
        return trainer, result

    return lockstep(replica, replicas)[0]


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in checkpoint.named(folder)]


def losses(folder):
    return [(r["step"], r.get("local_loss"), r.get("eval_loss")) for r in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    """The undisturbed run: its result, its losses."""
    base = tmp_path_factory.mktemp("whole")
    _, result = run(task, base)
    return result, losses(base / "host0")


@pytest.fixture(scope="module")
def at_seven(task, tmp_path_factory):
    """Folders of two hosts whose run was cut off after step 7: steps 4 and 6 are there."""
    base = tmp_path_factory.mktemp("seven")
    run(task, base, until=7)
    return base


@pytest.fixture
def cut(at_seven, tmp_path):
    shutil.copytree(at_seven, tmp_path / "run")
    return tmp_path / "run"


def assert_whole(base, result, whole):
    assert result.weights_digest == whole[0].weights_digest
    assert result.final_eval_loss == whole[0].final_eval_loss
    assert losses(base / "host0") == whole[1]


def test_every_host_keeps_its_part_and_the_last_two_steps(cut):
    for rank in range(2):
        folder = cut / f"host{rank}"
        assert steps_in(folder) == [4, 6]
        names = {p.name for p in (folder / "checkpoints" / "step_00000006").iterdir()}
        assert names == {
            "manifest.json",
            "model.safetensors",
            f"rank_{rank}.json",
            f"rank_{rank}.safetensors",
        }
        assert not list(folder.glob(".replica_*"))
    manifests = [(cut / f"host{r}/checkpoints/step_00000006/manifest.json").read_bytes() for r in range(2)]
    assert manifests[0] == manifests[1]


def test_replicas_that_share_a_folder_write_the_shared_weights_once(task, tmp_path, monkeypatch):
    written = []
    save_file = checkpoint.save_file
    monkeypatch.setattr(
        checkpoint,
        "save_file",
        lambda tensors, path: (written.append(Path(path).name), save_file(tensors, path)),
    )
    run(task, tmp_path, shared=True, steps=2)
    assert sorted(written) == ["model.safetensors", "rank_0.safetensors", "rank_1.safetensors"]
    assert steps_in(tmp_path / "all") == [2]


def test_some_replicas_may_share_a_folder(tmp_path):
    def replica(transport):
        found = Together.find(tmp_path / ("a" if transport.rank < 2 else "b"), transport)
        return list(found.ranks), found.first, found.launch

    found = lockstep(replica, 3)
    assert [f[:2] for f in found] == [([0, 1], True), ([0, 1], False), ([2], True)]
    assert len({f[2] for f in found}) == 1


def test_hosts_go_on_to_the_undisturbed_result(task, cut, whole):
    trainer, result = run(task, cut, resume=True)
    assert trainer.notes == []
    assert_whole(cut, result, whole)


def test_the_folders_of_all_hosts_copied_into_one_go_on_there(task, cut, whole):
    for rank in (1, 0):
        shutil.copytree(cut / f"host{rank}", cut / "all", dirs_exist_ok=True)
    _, result = run(task, cut, resume=True, shared=True)
    assert result.weights_digest == whole[0].weights_digest
    assert losses(cut / "all") == whole[1]


def test_a_kill_between_written_and_named_leaves_the_step_before(task, tmp_path, whole, monkeypatch):
    """Host 0 has named step 6 when host 1, which has written its part, is killed."""
    all_did = checkpoint._all_did

    def killed(what, step, problem, transport):
        if what == "write" and step == 6 and transport.rank == 1:
            all_did(what, step, problem, transport)
            raise CutError
        all_did(what, step, problem, transport)

    monkeypatch.setattr(checkpoint, "_all_did", killed)

    def replica(rank, make):
        Trainer(config(), task, make(), folder_of(tmp_path, rank)).run()

    with pytest.raises((CutError, ReplicaLostError)):
        run_threads(replica, replicas=2)
    monkeypatch.undo()
    assert steps_in(tmp_path / "host0")[-1] == 6
    # Nobody let step 4 go before all had step 6.
    assert 4 in steps_in(tmp_path / "host0")
    assert (tmp_path / "host1/checkpoints/step_00000006.partial/rank_1.json").exists()
    assert [s for s in steps_in(tmp_path / "host1") if s > 4] == []
    trainer, result = run(task, tmp_path, resume=True)
    assert trainer.notes == [
        "the replicas go on from step 4, the newest that they have in common; replica 0 has step 6"
    ]
    assert_whole(tmp_path, result, whole)
    assert not list(tmp_path.glob("*/checkpoints/*.partial"))


def test_hosts_whose_newest_steps_differ_go_on_from_the_newest_that_all_have(task, cut, whole):
    shutil.rmtree(cut / "host1/checkpoints/step_00000006")
    trainer, result = run(task, cut, resume=True)
    assert "go on from step 4" in trainer.notes[0]
    assert_whole(cut, result, whole)


def test_a_step_that_was_given_up_does_not_come_back(task, cut):
    """Host 0 keeps a step that the run did not go on from: it goes when an older one is saved."""
    shutil.rmtree(cut / "host1/checkpoints/step_00000006")
    run(task, cut, resume=True, checkpoint_every=5)
    assert steps_in(cut / "host0") == steps_in(cut / "host1") == [5, 9]


def test_parts_of_two_attempts_at_a_step_are_never_put_together(task, cut):
    part = cut / "host1/checkpoints/step_00000006/rank_1.json"
    saved = json.loads(part.read_text())
    part.write_text(json.dumps({**saved, "attempt": "another"}))
    trainer, _ = run(task, cut, resume=True, until=5)
    assert "from another attempt at this step, and is passed over" in trainer.notes[0]
    assert "go on from step 4" in trainer.notes[1]


# At step 6 the first fragment is in flight, and the second, merged in step 5, was sent in step 4.
IN_FLIGHT = "one_bit_muon(interval=4, fragments=2, delay=1)"


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("recipe", ["one_bit_muon(interval=4)", IN_FLIGHT, "ef21_muon", "psyche", "muon"])
def test_an_empty_folder_gets_what_all_share_and_says_what_is_lost(task, tmp_path, recipe, lost):
    run(task, tmp_path, until=7, recipe=recipe)
    shutil.rmtree(tmp_path / f"host{lost}")
    kept = checkpoint.load_weights(tmp_path / f"host{1 - lost}/checkpoints/step_00000006")
    started = {}

    def look(trainer):
        with trainer.optimizer.shared_weights():
            started[trainer.transport.rank] = {n: t.detach().clone() for n, t in trainer.named_tensors()}
        if trainer.transport.rank == lost and recipe.startswith("one_bit"):
            states = trainer.optimizer.state.values()
            assert not any(s["outer"]["exchange"]["residual"].any() for s in states)
            assert any(s["outer"]["momentum"]["buffer"].any() for s in states)
            assert trainer.optimizer.steps_alone == (4 if recipe == IN_FLIGHT else 2)
            assert "outer.exchange.residual" in trainer.notes[0]

    trainer, result = run(task, tmp_path, resume=True, before=look, recipe=recipe)
    (note,) = trainer.notes
    assert note.startswith(f"replica {lost} has no whole part of step 6 in ")
    assert f"host{lost}: weights and shared state come from replica {1 - lost}" in note
    assert ("the metrics so far" in note) == (lost == 0)
    says = {
        "one_bit_muon(interval=4)": "begin at zero, and lost are its own 2 step(s) since",
        IN_FLIGHT: "begin at zero, and lost are its own 4 step(s) since",
        "ef21_muon": "exchange.estimate",
        "psyche": "exchange.residual",
        "muon": f"replica {1 - lost}; lost are",
    }
    assert says[recipe] in note
    for rank in range(2):
        for name, tensor in kept.items():
            assert torch.equal(started[rank][name], tensor), (rank, name)
    # The digests of all replicas agree, or the run would have raised.
    assert result.finished
    assert steps_in(tmp_path / f"host{lost}") == [8, 9]


def test_nothing_of_a_replicas_own_is_lost_where_nothing_is_its_own(task, cut, tmp_path):
    """Dense Muon keeps nothing of a replica's own but its random state, which nothing here draws from."""
    _, undisturbed = run(task, tmp_path / "muon", recipe="muon")
    run(task, tmp_path / "again", recipe="muon", until=7)
    shutil.rmtree(tmp_path / "again/host1")
    _, result = run(task, tmp_path / "again", resume=True, recipe="muon")
    assert result.weights_digest == undisturbed.weights_digest


def test_a_damaged_part_is_lent_where_no_common_step_is_left(task, cut):
    for step in (4, 6):
        path = cut / f"host1/checkpoints/step_{step:08d}/rank_1.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    trainer, result = run(task, cut, resume=True)
    assert (
        "is damaged for rank 1 (rank_1.safetensors is not what was written), and is passed over"
        in trainer.notes[0]
    )
    assert "replica 1 has no whole part of step 6" in trainer.notes[1]
    assert result.finished


def test_four_hosts_of_which_two_lost_their_disks(task, tmp_path):
    run(task, tmp_path, replicas=4, until=5)
    for rank in (1, 2):
        shutil.rmtree(tmp_path / f"host{rank}")
    trainer, result = run(task, tmp_path, replicas=4, resume=True)
    assert [note[:9] for note in trainer.notes] == ["replica 1", "replica 2"]
    assert result.finished


def snapshot(base):
    return {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}


def refused_on_all(task, base, says, *, options=lambda rank: {}, resume=lambda rank: True):
    """Every replica raises the same error, and no file changes."""
    before = snapshot(base)

    def replica(transport):
        with pytest.raises(UsageError, match=says) as caught:
            train_here(
                config(**options(transport.rank)),
                folder_of(base, transport.rank),
                transport,
                resume=resume(transport.rank),
            )
        return str(caught.value)

    texts = lockstep(replica, 2)
    assert len(set(texts)) == 1
    assert snapshot(base) == before


@pytest.mark.parametrize(
    ("damage", "options", "resume", "says"),
    [
        (
            "",
            lambda rank: {"seed": rank},
            lambda _: True,
            r"replica 1: .* another run: config.seed was 0, now 1",
        ),
        (
            "host1",
            lambda rank: {"seed": rank},
            lambda _: True,
            r"replica 1: .* another run: config.seed was 0, now 1",
        ),
        ("", lambda _: {}, lambda rank: rank == 1, "of 2 replicas, 1 were started with --resume"),
        ("host0", lambda _: {}, lambda _: False, r"replica 1: train: .*host1 holds a run already"),
        ("both", lambda _: {}, lambda _: True, r"is damaged for rank 0 .* no replica has a step"),
    ],
    ids=["other settings", "other settings and an empty folder", "resume on one", "no resume", "all damaged"],
)
def test_what_does_not_fit_is_one_error_on_every_replica(task, cut, damage, options, resume, says):
    if damage == "both":
        for path in cut.rglob("rank_*.json"):
            path.write_text("{")
    elif damage:
        shutil.rmtree(cut / damage)
    refused_on_all(task, cut, says, options=options, resume=resume)


def test_machines_that_have_changed_their_ranks_are_told(task, cut):
    (cut / "host0").rename(cut / "was0")
    (cut / "host1").rename(cut / "host0")
    (cut / "was0").rename(cut / "host1")
    refused_on_all(
        task,
        cut,
        r"host0 is the folder of replica 0 and holds the part of replica 1, which has none in its own",
    )


@pytest.mark.usefixtures("in_threads")
def test_a_folder_that_cannot_be_made_is_named_on_every_replica(task, tmp_path):
    (tmp_path / "host1").write_text("a file in the way")
    refused_on_all(task, tmp_path, r"replica 1: the folder .*host1 cannot be written", resume=lambda _: False)


def test_a_folder_that_cannot_be_written_is_named_on_every_replica(task, tmp_path):
    def replica(transport):
        folder = folder_of(tmp_path, transport.rank)
        trainer = Trainer(config(steps=2), task, transport, folder)
        if transport.rank == 1:
            (folder / "checkpoints").write_text("a file in the way")
        with pytest.raises(
            UsageError, match=r"not all replicas could write that of step 2: replica 1: .*host1"
        ):
            trainer.run()

    lockstep(replica, 2)
    assert steps_in(tmp_path / "host0") == []


@pytest.fixture
def in_threads(monkeypatch):
    """Signals are for the main thread."""
    monkeypatch.setattr(single, "on_stop_signal", lambda _: contextlib.nullcontext())


@pytest.mark.usefixtures("in_threads")
def test_the_other_hosts_folders_say_where_the_rest_is(tmp_path):
    lockstep(lambda t: train_here(config(steps=2), folder_of(tmp_path, t.rank), t, resume=False), 2)
    said = json.loads((tmp_path / "host1/where.json").read_text())
    assert said["are_written_by"]["folder"] == str(tmp_path / "host0")
    assert said["are_written_by"]["replica"] == 0
    assert said["this_folder"]["replicas"] == [1]
    assert set(said["files"]) >= {"metrics.jsonl", "result.json", "config.json"}
    assert {p.name for p in (tmp_path / "host1").iterdir()} == {"where.json", "checkpoints"}
    assert not (tmp_path / "host0/where.json").exists()
    # Copied to one machine, the folder holds what the file points to.
    shutil.copytree(tmp_path / "host1", tmp_path / "all")
    shutil.copytree(tmp_path / "host0", tmp_path / "all", dirs_exist_ok=True)
    lockstep(lambda t: train_here(config(steps=2), tmp_path / "all", t, resume=True), 2)
    assert not (tmp_path / "all/where.json").exists()


@pytest.mark.usefixtures("in_threads")
def test_a_resume_without_any_checkpoint_says_that_it_starts(tmp_path, capsys):
    lockstep(lambda t: train_here(config(steps=2), folder_of(tmp_path, t.rank), t, resume=True), 2)
    assert "no replica has a checkpoint of this run: it starts at step 1" in capsys.readouterr().out
