"""A host's events and status: what they tell, how often, and that the training does not depend on them."""

import json
import os

import pytest

from muonwire.errors import StoppedError
from muonwire.train import TrainConfig, Trainer
from muonwire.train.events import EVENTS, STATUS, Events, read_events
from muonwire.train.progress import Display
from muonwire.train.recording import recording
from muonwire.train.status import read_status
from muonwire.transport import SingleReplica, Traffic, run_threads
from tests.tiny_task import TinySettings

TINY = TinySettings(sequence=16, batch=2, evaluation_sequences=4)


@pytest.fixture(scope="module")
def task():
    return TINY.make()


def trainer_of(task, folder, transport=None, **options):
    defaults = {"steps": 6, "evaluate_every": 3, "checkpoint_every": 3, "digest_every": 3, "task": TINY}
    config = TrainConfig(**{**defaults, "tensorboard": False, "recipe": "local_muon(interval=2)", **options})
    return Trainer(config, task, transport or SingleReplica(), folder)


def run(trainer, on_progress=None):
    with recording(trainer, Display(lambda _: None)):
        return trainer.run(on_progress)


def status_of(folder):
    return json.loads((folder / STATUS).read_text())


def test_a_run_and_its_resumption_tell_what_happened(task, tmp_path):
    trainer = trainer_of(task, tmp_path)
    run(trainer, lambda progress: trainer.request_stop() if progress.step == 3 else None)
    assert status_of(tmp_path)["outcome"] == "stopped"
    again = trainer_of(task, tmp_path)
    assert again.resume()
    run(again)
    told = [(e["event"], e["step"]) for e in read_events(tmp_path) if e["event"] != "synchronized"]
    assert told == [
        ("start", 0),
        ("checkpoint", 3),
        ("end", 3),
        ("resume", 3),
        ("checkpoint", 6),
        ("end", 6),
    ]
    events = read_events(tmp_path)
    assert [e["outcome"] for e in events if e["event"] == "end"] == ["stopped", "finished"]
    assert [e["time_s"] for e in events] == sorted(e["time_s"] for e in events)
    assert events[0]["members"] == ["0"]
    status = status_of(tmp_path)
    assert (status["outcome"], status["step"], status["first_step"]) == ("finished", 6, 3)
    assert status["pid"] == os.getpid()


def _two(task, folders):
    def replica(rank, make_transport):
        trainer = trainer_of(task, folders[rank], make_transport())
        run(trainer)
        return trainer.transport.meter.by_purpose["update"]

    return run_threads(replica, replicas=2)


def test_every_host_has_its_events_and_all_synchronizations_count(task, tmp_path, monkeypatch):
    # Each of the two is the first on its machine.
    monkeypatch.setenv("LOCAL_RANK", "0")
    folders = [tmp_path / "a", tmp_path / "b"]
    traffic = _two(task, folders)
    for rank, folder in enumerate(folders):
        lines = [e for e in read_events(folder) if e["event"] == "synchronized"]
        assert sum(e["count"] for e in lines) == 3
        # What comes before the first step, the agreement on the parameters, is no synchronization of a step.
        assert 0 < sum(e["sent_bytes"] for e in lines) <= traffic[rank].egress_bytes
        status = status_of(folder)
        assert (status["rank"], status["synchronizations"], status["synchronized"]["step"]) == (rank, 3, 6)
        assert list(status["members"]) == ["0", "1"]
        assert read_events(folder)[-1]["outcome"] == "finished"


def test_where_hosts_share_a_folder_the_first_writes(task, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    _two(task, [tmp_path, tmp_path])
    assert [e["rank"] for e in read_events(tmp_path) if e["event"] == "start"] == [0]
    assert status_of(tmp_path)["rank"] == 0


def test_on_one_machine_the_first_replica_writes(task, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    _two(task, [tmp_path / "a", tmp_path / "b"])
    assert (tmp_path / "a" / EVENTS).exists()
    assert not (tmp_path / "b" / EVENTS).exists()


class Named(SingleReplica):
    """A transport whose replicas come and go as a test says."""

    def __init__(self, *members):
        super().__init__()
        self.members = members


def test_members_come_and_go(tmp_path):
    transport = Named("oak", "elm")
    with Events(tmp_path, transport, steps=9) as events:
        events.stepped(1)
        transport.members = ("oak", "fir", "ash")
        events.stepped(2)
        transport.members = ("oak", "ash")
        events.members(epoch=7, seconds=1.5)
        events.members()
        events.stepped(3)
        events.end("finished")
    changes = [e for e in read_events(tmp_path) if e["event"] == "members"]
    assert [(c["members"], c["joined"], c["left"], c.get("epoch"), c.get("seconds")) for c in changes] == [
        (["oak", "fir", "ash"], ["fir", "ash"], ["elm"], None, None),
        (["oak", "ash"], [], ["fir"], 7, 1.5),
    ]
    status = read_status(tmp_path)
    assert (status.joins, status.leaves, list(status.members)) == (2, 2, ["oak", "ash"])
    assert status.members["oak"] < status.members["ash"]


def test_synchronizations_are_thinned_and_none_is_lost(tmp_path, monkeypatch):
    transport = SingleReplica()
    clock = [1000.0]
    monkeypatch.setattr("muonwire.train.events.time.time", lambda: clock[0])
    written = []
    with Events(tmp_path, transport, steps=5000) as events:
        write = events._write_status
        events._write_status = lambda now_s: written.append(now_s) or write(now_s)
        for step in range(1, 5001):
            clock[0] += 0.001
            transport.meter.add("update", Traffic(egress_bytes=10, received_bytes=20, num_messages=1))
            events.stepped(step)
        during = len(written)
    lines = [e for e in read_events(tmp_path) if e["event"] == "synchronized"]
    # 5000 steps took 5 seconds of this clock.
    assert len(lines) <= 7
    assert during <= 7
    assert sum(e["count"] for e in lines) == 5000
    assert sum(e["sent_bytes"] for e in lines) == 50_000
    assert sum(e["received_bytes"] for e in lines) == 100_000


def test_waits_and_refused_messages_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("muonwire.transport.waiting.LONG_S", 0.0)
    monkeypatch.setattr("muonwire.train.events.EVERY_S", 0.0)
    transport = SingleReplica()
    with Events(tmp_path, transport, steps=9) as events:
        with transport.waits.on("replica 1 (10.77.0.2)", peer="1"):
            events.waiting(transport.waits.text())
            status = read_status(tmp_path)
            assert status.waiting == "waiting for replica 1 (10.77.0.2) for 0 s"
            assert 0 < status.wait_s["1"] < 60
        with transport.waits.on("replicas (1 of at least 2 are there)"):
            pass
        for kind in ("altered", "altered", "replayed"):
            transport.meter.reject(kind)
        events.stepped(1)
        transport.meter.reject("replayed")
        events.stepped(2)
        events.stepped(3)
    told = [e for e in read_events(tmp_path) if e["event"] in ("waited", "rejected")]
    assert [e.get("peer") for e in told[:2]] == ["1", "replicas (1 of at least 2 are there)"]
    assert [e["kinds"] for e in told[2:]] == [{"altered": 2, "replayed": 1}, {"replayed": 1}]
    status = read_status(tmp_path)
    assert status.rejected == {"altered": 2, "replayed": 2}
    assert list(status.wait_s) == ["1"]
    assert status.waiting is None


@pytest.mark.parametrize(
    ("error", "state", "told"),
    [
        (ValueError("no such luck"), "failed", {"error": "ValueError: no such luck"}),
        # Such as a member that is asked to leave before it has met the others.
        (StoppedError("asked to stop"), "stopped", {}),
    ],
)
def test_a_run_that_ends_with_an_error_says_so(error, state, told, tmp_path):
    def ends():
        with Events(tmp_path, SingleReplica(), steps=9):
            raise error

    with pytest.raises(type(error), match=str(error)):
        ends()
    end = read_events(tmp_path)[-1]
    assert {name: end[name] for name in end if name in ("event", "outcome", "error")} == {
        "event": "end",
        "outcome": state,
        **told,
    }
    assert read_status(tmp_path).state == state


def test_a_folder_that_takes_nothing_is_said_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with Events(tmp_path / "file" / "run", SingleReplica(), steps=9) as events:
        for step in range(1, 4):
            events.add("checkpoint", step=step)
    said = capsys.readouterr().out
    assert said.count("cannot take events") == 1
    assert "the run goes on" in said


def test_what_a_killed_run_left_half_written_is_passed_over(tmp_path):
    with Events(tmp_path, SingleReplica(), steps=9):
        pass
    whole = read_events(tmp_path)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"time_s": 1.0, "step": 3, "ev')
    assert read_events(tmp_path) == whole
    (tmp_path / EVENTS).write_text('[1]\n7\n{"event": "start"}\n')
    assert read_events(tmp_path) == []
