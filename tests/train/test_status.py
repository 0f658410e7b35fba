"""`read_status`: of runs that last, are over, died, or run elsewhere; and of folders that are no run."""

import json
import os
import signal
import subprocess
import sys

import pytest

from muonwire.errors import UsageError
from muonwire.train.events import STATUS, Events
from muonwire.train.status import age_s, read_status
from muonwire.transport import SingleReplica


@pytest.fixture
def running(tmp_path):
    with Events(tmp_path / "run", SingleReplica(), steps=9) as events:
        events.stepped(1)
        yield tmp_path / "run"


def change(folder, **values):
    path = folder / STATUS
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_run_of_a_living_process_runs(running):
    status = read_status(running)
    assert (status.state, status.pid, status.steps, status.is_over) == ("running", os.getpid(), 9, False)
    assert 0 <= age_s(status) < 60
    assert age_s(status, now_s=status.written_s + 5) == 5


def test_a_killed_run_has_died(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from muonwire.train.events import Events\n"
        "from muonwire.transport import SingleReplica\n"
        "with Events(Path(sys.argv[1]), SingleReplica(), steps=9):\n    print('in', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    assert read_status(tmp_path).state == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    status = read_status(tmp_path)
    assert (status.state, status.is_over) == ("died", True)


def test_another_process_with_the_same_number_is_not_the_run(running):
    change(running, process_start=1)
    assert read_status(running).state == "died"


def test_where_the_system_does_not_say_when_a_process_began_its_number_counts(running):
    change(running, process_start=None)
    assert read_status(running).state == "running"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    change(running, process_start=None, pid=process.pid)
    assert read_status(running).state == "died"


def test_of_another_machine_it_is_not_known(running):
    change(running, host="elsewhere", waiting="waiting for replica 1 for 9 s")
    status = read_status(running)
    assert (status.state, status.is_over, status.waiting) == ("unknown", False, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has format 'list', this version reads 1"),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ('{"format": 1, "synchronized": null}', "is damaged"),
    ],
)
def test_a_status_that_cannot_be_read_is_one_error(content, message, tmp_path):
    (tmp_path / STATUS).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_status(tmp_path)


def test_folders_that_are_no_run_are_named_with_the_runs_in_them(running):
    with pytest.raises(UsageError, match="missing is not a folder; give the --out of a run"):
        read_status(running / "missing")
    (running / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty has no status\.json.*give the --out of one"):
        read_status(running / "empty")
    with pytest.raises(UsageError, match=r"there are runs in it: run$"):
        read_status(running.parent)
