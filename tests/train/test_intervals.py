"""`muonwire train` with an interval that follows the link: its record, and the same run by the record."""

import json

import pytest

from muonwire.errors import UsageError
from muonwire.train import TrainConfig, Trainer
from muonwire.train.events import read_events
from muonwire.train.metrics import read_metrics
from muonwire.transport import SingleReplica
from tests.commands import run
from tests.tiny_task import TINY, TinySettings

SMALL = TinySettings(sequence=16, batch=2, evaluation_sequences=4)


def train(out, recipe):
    words = ["train", "--recipe", recipe, "--steps", "40", "--out", str(out), "--replicas", "2"]
    words += ["--sequence", "16", "--batch", "2", "--evaluation-sequences", "4", "--lr", "0.01"]
    words += [*TINY, "--threads", "1", "--no-page", "--no-tensorboard", "--evaluate-every", "20"]
    done = run(words)
    assert done.returncode == 0, done.stderr
    return done


def digest_of(out):
    return json.loads((out / "result.json").read_text())["weights_digest"]


def test_the_interval_follows_the_link_and_the_record_gives_the_run_again(tmp_path):
    options = ", fragments=2, delay=1"
    # On the loopback a message takes a small part of a step, but more than a thousandth of a thousandth.
    auto = f"local_muon(interval='auto', share=0.000001, intervals=(3, 8){options})"
    done = train(tmp_path / "auto", auto)
    assert "waiting stays below 0.0001 % of the time (H from 3 to 8)" in done.stdout
    assert "H is 8 from step 26 on: replicas wait " in done.stderr
    record = json.loads((tmp_path / "auto" / "intervals.json").read_text())
    first, change = record["changes"]
    assert (record["format"], record["recipe"]) == (1, auto)
    assert first == {"step": 0, "interval": 5}
    # After three figures, of which the first is that of the second interval, and an interval later.
    assert (change["step"], change["interval"]) == (25, 8)
    assert change["wait_us"] > 0
    assert change["step_us"] > 0
    (event,) = [e for e in read_events(tmp_path / "auto") if e["event"] == "interval"]
    assert {key: event[key] for key in change} == change
    told = [
        m["synchronization/interval"]
        for m in read_metrics(tmp_path / "auto")
        if "synchronization/interval" in m
    ]
    assert (told[0], told[-1]) == (5, 8)
    path = tmp_path / "auto" / "intervals.json"
    again = tmp_path / "again"
    done = train(again, f"local_muon(interval='{path}'{options})")
    assert "then by a record of 1 change" in done.stdout
    assert digest_of(again) == digest_of(tmp_path / "auto")
    told = json.loads((again / "intervals.json").read_text())["changes"]
    assert [(c["step"], c["interval"]) for c in told] == [(0, 5), (change["step"], 8)]


def test_a_resumed_run_has_the_interval_and_rewrites_what_it_goes_back_over(tmp_path):
    settings = TrainConfig(
        recipe="local_muon(interval=[(0, 3), (3, 2), (7, 4)])",
        steps=12,
        checkpoint_every=5,
        digest_every=0,
        probes=0,
        tensorboard=False,
        task=SMALL,
    )
    task = SMALL.make()

    def stop_at_nine(progress):
        if progress.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(settings, task, SingleReplica(), tmp_path).run(stop_at_nine)

    def recorded():
        return [
            (c["step"], c["interval"])
            for c in json.loads((tmp_path / "intervals.json").read_text())["changes"]
        ]

    assert recorded() == [(0, 3), (3, 2), (7, 4)]
    again = Trainer(settings, task, SingleReplica(), tmp_path)
    assert again.resume()
    seen = []
    again.run(lambda progress: seen.append((progress.step, recorded()[-1])))
    assert seen[0] == (6, (3, 2))
    assert seen[-1] == (12, (7, 4))


def test_one_replica_says_that_nothing_is_measured(tmp_path):
    settings = TrainConfig(
        recipe="local_muon(interval='auto')", steps=4, task=SMALL, tensorboard=False, probes=0
    )
    trainer = Trainer(settings, SMALL.make(), SingleReplica(), tmp_path)
    assert "H stays 5, since one replica has nobody to wait for" in str(trainer.optimizer)


def test_a_record_that_is_not_there_is_an_error_before_anything_starts():
    with pytest.raises(UsageError, match=r"no-such\.json', which is no record of intervals"):
        TrainConfig(recipe="local_muon(interval='no-such.json')")
