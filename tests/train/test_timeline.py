"""The time line of a run, and its page."""

import json
import re
import sys

import pytest

from muonwire.errors import UsageError
from muonwire.tasks import TextSettings
from muonwire.train import TrainConfig, train
from muonwire.train.events import Events
from muonwire.train.page import PAGE, print_page, run_page, write_page
from muonwire.train.timeline import (
    BEGAN,
    CHECKPOINT,
    ENDED,
    IN,
    INTERVAL,
    JOINED,
    LEFT,
    MOST,
    MOST_ROWS,
    REJECTED,
    RUN,
    SYNCHRONIZED,
    WAITED,
    timeline,
)
from muonwire.transport import SingleReplica, Traffic


def event(at_s, kind, step=0, **values):
    return {"time_s": 1000.0 + at_s, "step": step, "event": kind, **values}


HISTORY = [
    event(0, "start", members=["a", "b"]),
    event(10, "synchronized", 5, count=5),
    event(20, "waited", 6, peer="b", seconds=8.0),
    event(21, "members", 6, members=["a"], joined=[], left=["b"]),
    event(25, "checkpoint", 10),
    event(26, "interval", 10, interval=22, wait_us=5, step_us=6),
    event(30, "members", 12, members=["a", "b", "c"], joined=["b", "c"], left=[]),
    event(35, "rejected", 13, kinds={"altered": 2}),
    # Killed here, and started again.
    event(50, "resume", 10, members=["a", "c"]),
    event(60, "end", 20, outcome="finished"),
]


def spans(line, row, kind=IN):
    return [(s.begin_s, s.end_s) for s in line.spans if s.row == row and s.kind == kind]


def marks(line, row):
    return [(m.at_s, m.kind) for m in line.marks if m.row == row and m.kind != SYNCHRONIZED]


def test_presence_waits_and_marks_are_where_they_were():
    line = timeline(HISTORY)
    assert line.rows == ["a", "b", "c"]
    assert spans(line, "a") == [(0, 35), (50, 60)]
    assert spans(line, "b") == [(0, 21), (30, 35)]
    assert spans(line, "c") == [(30, 35), (50, 60)]
    assert spans(line, "b", WAITED) == [(12, 20)]
    assert marks(line, "b") == [(21, LEFT), (30, JOINED)]
    assert marks(line, RUN) == [
        (0, BEGAN),
        (25, CHECKPOINT),
        (26, INTERVAL),
        (35, REJECTED),
        (35, ENDED),
        (50, BEGAN),
        (60, ENDED),
    ]
    ended = [m.text for m in line.marks if m.kind == ENDED]
    assert ended == ["without a word: its process was ended", "finished"]
    assert [(m.row, m.at_s, m.count) for m in line.marks if m.kind == SYNCHRONIZED] == [
        ("a", 10, 5),
        ("b", 10, 5),
    ]
    assert (line.end_s, line.notes) == (60, [])


def test_a_run_that_lasts_goes_up_to_now():
    line = timeline(HISTORY[:2], until_s=1015.0)
    assert spans(line, "a") == [(0, 15)]
    assert timeline([]).rows == []


def test_a_long_history_is_thinned_and_says_so():
    history = [event(0, "start", members=["a", "b"])]
    for i in range(20_000):
        history.append(event(i, "synchronized", i, count=2))
        history.append(event(i + 0.5, "waited", i, peer="b", seconds=1 + i / 1e5))
        if i % 4 == 0:
            history.append(event(i + 0.6, "members", i, members=["a"], joined=[], left=["b"]))
            history.append(event(i + 0.7, "members", i, members=["a", "b"], joined=["b"], left=[]))
            history.append(event(i + 0.8, "checkpoint", i))
    line = timeline(history)
    for kind in (IN, WAITED):
        assert 0 < len([s for s in line.spans if s.kind == kind]) <= MOST
    for kind in (JOINED, LEFT, CHECKPOINT, SYNCHRONIZED):
        assert 0 < len([m for m in line.marks if m.kind == kind]) <= MOST
    synchronized = {m.at_s: m.count for m in line.marks if m.kind == SYNCHRONIZED and m.row == "a"}
    assert sum(synchronized.values()) == 40_000
    # The longest waits are kept.
    assert (
        min(s.end_s - s.begin_s for s in line.spans if s.kind == WAITED) >= 1 + (20_000 - MOST) / 1e5 - 1e-6
    )
    assert any("waits" in note for note in line.notes)
    assert any("'joined'" in note for note in line.notes)


def test_many_replicas_have_as_many_rows_as_fit():
    names = [f"r{i}" for i in range(100)]
    line = timeline([event(0, "start", members=names), event(1, "synchronized", 1), event(2, "end", 1)])
    assert len(line.rows) == MOST_ROWS
    assert {s.row for s in line.spans} == set(line.rows)
    assert any("100 replicas" in note for note in line.notes)


@pytest.fixture
def run_folder(tmp_path):
    """A run with metrics, whose name would be markup."""
    folder = tmp_path / "run"
    transport = SingleReplica()
    transport.members = ("<b>oak</b>", "elm")
    with Events(folder, transport, steps=40) as events:
        transport.meter.waited("elm", 3.25)
        transport.meter.add("update", Traffic(egress_bytes=1234, num_messages=1))
        events.stepped(40)
        events.end("finished")
    rows = [
        {
            "step": s,
            "local_loss": 5 - s / 20,
            "sent_bytes": 100 * (s // 5),
            "compute_s": s / 10,
            "exchange_s": s / 20,
        }
        for s in range(41)
    ]
    rows[0]["eval_loss"] = 5.0
    rows[40]["eval_loss"] = 3.1234
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"recipe": "one_bit_muon(interval=5)"}))
    return folder


def test_the_page_shows_losses_and_the_time_line(run_folder):
    text = write_page(run_folder).read_text()
    assert "one_bit_muon(interval=5)" in text
    assert "Finished, step 40 of 40. Evaluation loss 3.1234." in text
    names = [chart.name for chart in run_page(run_folder).charts]
    assert names == ["loss_by_steps", "loss_by_bytes", "loss_by_time", "timeline"]
    # It loads nothing, and a name cannot bring markup in.
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    assert "<b>oak" not in text
    assert "3.25\u00a0s" in text


def test_the_losses_lie_at_their_costs(run_folder):
    charts = {chart.name: chart for chart in run_page(run_folder).charts}

    def values(name):
        data = [
            layer["data"] if "data" in layer else charts[name].spec["data"]
            for layer in charts[name].spec["layer"]
        ]
        return [(row["recipe"], row["x"], row["y"]) for row in data[0]["values"]]

    by_steps = values("loss_by_steps")
    assert [v for v in by_steps if v[0] == "evaluation"] == [
        ("evaluation", 0, 5.0),
        ("evaluation", 40, 3.1234),
    ]
    assert len([v for v in by_steps if v[0] == "training"]) == 41
    # Five steps at a time have sent the same bytes; their losses have one mean.
    by_bytes = [v for v in values("loss_by_bytes") if v[0] == "training"]
    assert by_bytes[:2] == [("training", 0.0, 4.9), ("training", 100.0, pytest.approx(4.65))]
    assert values("loss_by_time")[1] == ("evaluation", pytest.approx(6.0), 3.1234)


def test_a_host_without_metrics_has_the_time_line_alone(run_folder):
    (run_folder / "metrics.jsonl").unlink()
    (run_folder / "config.json").unlink()
    page = run_page(run_folder)
    assert [chart.name for chart in page.charts] == ["timeline"]
    assert page.title == "run"


def test_without_what_draws_it_a_line_says_how_to_get_it(run_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "altair", None)
    for name in [n for n in sys.modules if n.startswith("muonwire.pages")]:
        monkeypatch.delitem(sys.modules, name)
    print_page(run_folder)
    said = capsys.readouterr().out
    assert said.startswith(
        'no page: altair is not installed; pip install "muonwire[report]", then muonwire status'
    )
    assert said.count("\n") == 1
    assert not (run_folder / PAGE).exists()


@pytest.mark.parametrize("page", [True, False])
def test_a_training_run_draws_it_unless_told_otherwise(page, tmp_path, capsys):
    tiny = TextSettings(sequence=16, batch=2, evaluation_sequences=4)
    train(
        TrainConfig(steps=2, task=tiny, tensorboard=False, checkpoint_every=0), tmp_path, threads=1, page=page
    )
    assert (tmp_path / PAGE).exists() == page
    assert (f"page: {tmp_path / PAGE}" in capsys.readouterr().out) == page
    if page:
        assert "Finished, step 2 of 2." in (tmp_path / PAGE).read_text()


def test_a_folder_that_is_no_run_has_no_page(tmp_path):
    with pytest.raises(UsageError, match=r"has no status\.json"):
        write_page(tmp_path)
