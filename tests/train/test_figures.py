"""What synchronizations cost, between two lines of the metrics."""

import json

import pytest

from muonwire.tasks import TextSettings
from muonwire.train.config import TrainConfig
from muonwire.train.figures import SynchronizationFigures
from muonwire.train.loop import Trainer
from muonwire.train.metrics import METRICS
from muonwire.transport import SingleReplica, Traffic, run_threads


def test_figures_are_of_what_was_since_the_last_ones(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("muonwire.train.figures.time.monotonic", lambda: clock[0])
    transport = SingleReplica()
    figures = SynchronizationFigures(transport)
    meter = transport.meter

    def exchange():
        spent = {"egress_bytes": 3_000_000, "received_bytes": 1_000_000, "num_messages": 1}
        meter.add("update", Traffic(wait_s=0.5, overlap_s=1.5, **spent))
        meter.waited("elm", 0.5)
        meter.overlapped("elm", 1.25)
        figures.stepped()

    figures.stepped()
    assert figures.take(due=True) == {}
    exchange()
    # Too early.
    assert figures.take() == {}
    exchange()
    clock[0] += 1.0
    wanted = {
        "count": 2,
        "sent_bytes": 6_000_000,
        "received_bytes": 2_000_000,
        "wait_s": 1.0,
        "overlap_s": 3.0,
        "up_mbit_s": 12.0,
        "down_mbit_s": 4.0,
        "wait_s/elm": 1.0,
        "overlap_s/elm": 2.5,
    }
    assert figures.take() == {f"synchronization/{k}": pytest.approx(v) for k, v in wanted.items()}
    exchange()
    assert figures.take(due=True)["synchronization/count"] == 1
    assert figures.take(due=True) == {}


@pytest.mark.parametrize(
    ("recipe", "count"),
    # Steps 2, 4, 6, 8 and 9; and 3, 5, 7 and 9, where the last fragment arrives and all are synchronized.
    [("one_bit_muon(interval=2)", 5), ("one_bit_muon(interval=4, fragments=2, delay=1)", 4)],
)
def test_the_metrics_of_a_run_have_them_and_bytes_add_up_to_the_totals(recipe, count, tmp_path):
    config = TrainConfig(
        recipe=recipe,
        steps=9,
        evaluate_every=3,
        checkpoint_every=0,
        digest_every=0,
        probes=0,
        tensorboard=False,
        task=TextSettings(model_size="pico", sequence=16, batch=2),
    )
    task = config.task.make()

    def replica(rank, make):
        return Trainer(config, task, make(), tmp_path / str(rank), device="cpu").run()

    run_threads(replica, replicas=2)
    lines = [json.loads(line) for line in (tmp_path / "0" / METRICS).read_text().splitlines()]
    told = [line for line in lines if "synchronization/count" in line]
    assert told[-1]["step"] == 9
    assert sum(line["synchronization/count"] for line in told) == count
    sent = sum(line["synchronization/sent_bytes"] for line in told)
    # Beside updates the totals have the comparisons before them.
    assert 0.8 * lines[-1]["egress_bytes"] < sent < lines[-1]["egress_bytes"]
    assert all(line["synchronization/up_mbit_s"] > 0 for line in told)
    peers = {key for key in told[-1] if key.startswith("synchronization/wait_s/")}
    assert peers <= {"synchronization/wait_s/1"}
