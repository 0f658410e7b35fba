"""The file for Prometheus: its format, that it agrees with the meter and the metrics, and that no training depends on it."""

import re
import warnings

import pytest
import torch

from muonwire import recipes, stages
from muonwire.errors import UsageError
from muonwire.optim import ChainOptimizer
from muonwire.optim.prometheus import EVERY_S, METRICS, PrometheusFile
from muonwire.train import TrainConfig, Trainer
from muonwire.train.metrics import read_metrics
from muonwire.train.progress import Display
from muonwire.train.recording import recording
from muonwire.transport import run_threads
from tests.tiny_task import TinySettings

TASK = TinySettings(sequence=16, batch=2, evaluation_sequences=4)
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(
    rf"([a-zA-Z_:][a-zA-Z0-9_:]*)\{{({LABEL}(?:,{LABEL})*)\}} (NaN|[+-]Inf|-?[0-9.]+(?:e[+-]?[0-9]+)?)"
)


def read(path):
    """Samples by name and labels, as the text format 0.0.4 has them; each metric says once what it is, before its samples."""
    text = path.read_text()
    assert text.endswith("\n")
    found, current = {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split()[2]
            assert current not in found
            found[current] = {}
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name == current
            assert (kind == "counter") == name.endswith("_total")
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert name == current
            assert labels not in found[name]
            found[name][labels] = float(value)
    return found


def optimizer():
    return ChainOptimizer([torch.nn.Parameter(torch.eye(2))], chain=stages.Sign(), lr=0.1)


def test_a_training_writes_what_its_meter_and_its_metrics_say(tmp_path):
    path = tmp_path / "made" / "muonwire.prom"

    def replica(rank, make):
        config = TrainConfig(
            recipe="local_muon(interval=2)",
            steps=6,
            evaluate_every=3,
            checkpoint_every=0,
            tensorboard=False,
            prometheus=path,
            task=TASK,
        )
        trainer = Trainer(config, TASK.make(), make(), tmp_path / "run")
        with recording(trainer, Display(lambda _: None)):
            trainer.run()
        return trainer.transport.meter.total, trainer.prometheus is None

    first, second = run_threads(replica, replicas=2)
    # The second replica of a host writes nothing.
    assert (first[1], second[1]) == (False, True)
    found = read(path)
    assert set(found) == {f"muonwire_{name}" for name in METRICS}
    last = read_metrics(tmp_path / "run")[-1]

    def value(name, kind=""):
        (its,) = (v for labels, v in found[f"muonwire_{name}"].items() if kind in labels)
        return its

    assert value("steps_total") == 6
    assert value("synchronizations_total") == 3
    assert (value("interval_steps"), value("replicas"), value("skipped_steps_total")) == (2, 2, 0)
    assert value("loss", 'kind="training"') == last["local_loss"]
    assert value("loss", 'kind="evaluation"') == last["eval_loss"]
    # The digests at the end come after the last step's line.
    for name in ("sent_bytes", "egress_bytes", "received_bytes"):
        parts = found[f"muonwire_{name}_total"]
        assert 0 < value(f"{name}_total", 'purpose="update"') < sum(parts.values()) <= getattr(first[0], name)
    assert all('run="run",replica="0"' in labels for its in found.values() for labels in its)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_values_and_labels_of_any_kind_are_read_again(tmp_path):
    made = optimizer()
    made.transport.meter.waited('a "b" \\ c\nd', 1.5)
    file = PrometheusFile(tmp_path / "a.prom", made, labels={"run": 'x"\\\n'})
    file.write({"training": float("nan"), "evaluation": float("inf")}, due=True)
    found = read(tmp_path / "a.prom")
    assert found["muonwire_loss"]['kind="evaluation",run="x\\"\\\\\\n"'] == float("inf")
    assert list(found["muonwire_peer_wait_seconds_total"].values()) == [1.5]


def test_it_is_written_once_a_second_and_a_full_disk_is_told_of_once(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("muonwire.optim.prometheus.time.monotonic", lambda: clock[0])
    file = PrometheusFile(tmp_path / "a.prom", optimizer())
    for step, due, expected in ((1, False, 1), (2, False, 1), (3, True, 3), (4, False, 3)):
        file.write({"training": float(step)}, due=due)
        assert list(read(tmp_path / "a.prom")["muonwire_loss"].values()) == [expected]
    clock[0] += EVERY_S
    file.write()
    assert list(read(tmp_path / "a.prom")["muonwire_loss"].values()) == [4]
    (tmp_path / "file").write_text("no folder")
    lost = PrometheusFile(tmp_path / "file" / "a.prom", optimizer())
    with pytest.warns(UserWarning, match="cannot be written"):
        lost.write(due=True)
    with warnings.catch_warnings(action="error"):
        lost.write(due=True)


def test_a_growing_interval_is_told_as_it_is_now(tmp_path):
    model = torch.nn.Linear(4, 4)
    made = recipes.local_muon(model, lr=0.01, interval=2, growth=0.5)
    for _ in range(4):
        model(torch.ones(1, 4)).sum().backward()
        made.step()
        made.zero_grad()
    PrometheusFile(tmp_path / "a.prom", made).write(due=True)
    assert list(read(tmp_path / "a.prom")["muonwire_interval_steps"].values()) == [4]


@pytest.mark.parametrize("labels", [{"a-b": "x"}, {"1a": "x"}, {"peer": "x"}, {"é": "x"}])
def test_labels_that_prometheus_does_not_take_are_refused(labels, tmp_path):
    with pytest.raises(UsageError, match="label"):
        PrometheusFile(tmp_path / "a.prom", optimizer(), labels=labels)


def test_other_file_names_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match=r"does not end in \.prom"):
        TrainConfig(prometheus=tmp_path / "metrics.txt")


def test_numbers_and_labels_of_any_kind_are_written_as_prometheus_reads_them(tmp_path):
    path = tmp_path / "muonwire.prom"
    loss = torch.tensor(0.5, requires_grad=True)
    kinds = {"tensor": loss, "numpy": loss.detach().double().numpy()[()]}
    PrometheusFile(path, optimizer(), labels={"rank": 3, "run": "a\udcff"}).write(kinds, due=True)
    found = read(path)["muonwire_loss"]
    assert {labels.split(",")[0]: value for labels, value in found.items()} == {
        'kind="tensor"': 0.5,
        'kind="numpy"': 0.5,
    }
    assert all(',rank="3",' in labels for labels in found)
