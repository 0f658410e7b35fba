"""`muonwire status`: what it prints of a run that lasts and of one that is over, and its one error for what is no run."""

import io
import json
import re
import threading
import time

import pytest
from rich.console import Console

from muonwire.cli.main import main
from muonwire.cli.status import screen
from muonwire.train.events import Events
from muonwire.train.page import PAGE
from muonwire.train.status import read_status
from muonwire.transport import SingleReplica, Traffic


def call(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["status", *map(str, args)])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


class Replica(SingleReplica):
    members = ("oak", "elm")


@pytest.fixture
def events(tmp_path):
    made = Events(tmp_path / "run", Replica(), steps=300)
    with made:
        made.transport.meter.add(
            "update", Traffic(egress_bytes=1_230_000, received_bytes=4_000, num_messages=1)
        )
        made.transport.meter.waited("elm", 3.25)
        made.transport.meter.reject("altered")
        made.add("checkpoint", step=100)
        made.stepped(120)
        made._write_status(time.time())
        made.end("finished")
        yield made


def test_a_run_that_lasts(events, capsys):
    events.waiting("waiting for replica elm for 12 s (at most 600 s)")
    code, out, _ = call(capsys, events.folder)
    assert code == 0
    words = " ".join(out.split())
    for part in (
        "running, step 120 of 300",
        "waiting for replica elm for 12 s (at most 600 s)",
        "oak (this one)",
        "3.2 s",
        "step 120, 0.",
        "1 in all",
        "1.23 MB, 4 kB",
        "joined, left 0, 0",
        "1 altered",
        "last checkpoint step 100",
    ):
        assert part in words, (part, out)


def test_what_a_run_is_that_is_over_or_died(events):
    def shown(**changes):
        path = events.folder / "status.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        console = Console(file=io.StringIO(), width=200)
        console.print(screen(read_status(events.folder)))
        return console.file.getvalue()

    assert "finished, step 120 of 300" in shown(outcome="finished")
    assert "ended from outside at step 120 of 300; the same command with --resume" in shown(
        outcome=None, process_start=1
    )
    assert "whether it still runs, only birch knows" in shown(host="birch")
    failed = shown(outcome="failed", error="ReplicaLostError: replica 0 waited", members={"oak": 1.0})
    assert "ReplicaLostError: replica 0 waited" in failed
    assert re.search(r"elm +not in", failed)


def test_json_is_what_the_folder_says(events, capsys):
    code, out, _ = call(capsys, events.folder, "--json")
    printed = json.loads(out)
    assert code == 0
    assert printed.pop("age_s") >= 0
    status = read_status(events.folder)
    assert printed == {name: getattr(status, name) for name in printed}
    assert printed["wait_s"] == {"elm": 3.25}
    assert list(printed["members"]) == ["oak", "elm"]


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_watching_ends_with_the_run(how, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("muonwire.cli.status.REFRESH_S", 0.05)
    made = Events(tmp_path, Replica(), steps=3)
    made.__enter__()

    def go_on():
        time.sleep(0.2)
        made.stepped(3)
        made.end("finished")
        made.__exit__(None, None, None)

    thread = threading.Thread(target=go_on)
    thread.start()
    code, out, _ = call(capsys, tmp_path, "--watch", *how)
    thread.join()
    assert code == 0
    if how:
        states = [json.loads(line)["state"] for line in out.splitlines()]
        assert states[0] == "running"
        assert states[-1] == "finished"
        assert len(states) >= 3
    else:
        assert "finished, step 3 of 3" in " ".join(out.split())


def test_the_page_is_drawn_on_request(events, capsys):
    code, out, _ = call(capsys, events.folder, "--page")
    assert (code, out) == (0, f"page: {events.folder / PAGE}\n")
    assert "Running, at step 120 of 300" in (events.folder / PAGE).read_text()


def test_what_is_no_run_is_one_error(tmp_path, capsys):
    code, out, err = call(capsys, tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: status: {tmp_path / 'nothing'} is not a folder; give the --out of a run")
    assert err.count("\n") == 1
