"""TensorBoard has of the replicas what `muonwire status` shows."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muonwire.train.metrics import metrics_writer
from muonwire.transport import SingleReplica, Traffic


@pytest.fixture
def transport():
    made = SingleReplica()
    made.members = ("oak", "elm")
    return made


def write(folder, transport, steps):
    with metrics_writer(folder, after_step=0, tensorboard=True, enabled=True, transport=transport) as record:
        for step, change, values in steps:
            change()
            record(step, **values)
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_scalars_and_texts_of_the_replicas(transport, tmp_path):
    def wait():
        transport.meter.waited("elm", 2.5)
        transport.meter.add("update", Traffic(egress_bytes=100, received_bytes=200))

    def change():
        transport.members = ("oak", "fir")

    found = write(
        tmp_path, transport, [(0, wait, {"eval_loss": 5.0}), (1, change, {}), (2, wait, {"eval_loss": 4.0})]
    )

    def scalars(name):
        return [(event.step, event.value) for event in found.Scalars(name)]

    assert scalars("eval_loss") == [(0, 5.0), (2, 4.0)]
    assert scalars("replicas/in") == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert scalars("replicas/egress_bytes") == [(0, 100.0), (1, 100.0), (2, 200.0)]
    assert scalars("replicas/received_bytes")[-1] == (2, 400.0)
    assert scalars("wait_s/elm") == [(0, 2.5), (1, 2.5), (2, 5.0)]
    (text,) = found.Tensors("replicas/changes/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (1, b"fir joined; elm left")


def test_where_steps_are_fast_the_replicas_are_told_of_once_a_second(transport, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("muonwire.train.metrics.time.monotonic", lambda: clock[0])

    def tick():
        clock[0] += 0.01

    found = write(tmp_path, transport, [(step, tick, {"local_loss": 1.0}) for step in range(1, 401)])
    assert len(found.Scalars("local_loss")) == 400
    assert 3 <= len(found.Scalars("replicas/in")) <= 5
