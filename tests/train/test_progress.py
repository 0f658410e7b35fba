"""The progress line in a wait: for whom and how long, and the loss again when it is over."""

import functools
import io

import pytest
import rich.console

from muonwire.train.loop import Progress
from muonwire.train.progress import progress_bar

STEP = Progress(step=3, steps=9, train_loss=2.5, eval_loss=None)
WAIT = "waiting for replica 2 (10.77.0.3) for 12 s (at most 600 s)"
ANSWER = "replica 2 (10.77.0.3) answered after 31 s"


@pytest.fixture
def terminal(monkeypatch):
    text = io.StringIO()
    made = functools.partial(rich.console.Console, file=text, force_terminal=True, width=160)
    monkeypatch.setattr(rich.console, "Console", lambda stderr: made())
    return text


def test_the_bar_says_for_whom_it_waits_until_that_one_answers(terminal):
    with progress_bar("muon") as show:
        show(STEP)
        show.wait(WAIT)
        show.say(WAIT)
        show.say(ANSWER)
    shown = terminal.getvalue()
    # What changes is in the bar; only the end of the wait is a line of its own.
    lines = [line.strip() for line in shown.replace("\r", "\n").splitlines()]
    assert ANSWER in "\n".join(lines)
    assert any("3/9" in line and WAIT in line for line in lines)
    assert not any(line.endswith(WAIT) and "3/9" not in line for line in lines)


def test_after_a_wait_the_bar_has_the_loss_again(terminal):
    with progress_bar("muon") as show:
        show(STEP)
        show.wait(WAIT)
        show.wait("")
        terminal.truncate(0)
        show.say("a line, which draws the bar anew")
        shown = terminal.getvalue()
    assert "loss 2.500" in shown
    assert "waiting" not in shown


@pytest.mark.parametrize("enabled", [True, False])
def test_without_a_terminal_waits_are_lines_on_standard_error(enabled, capsys):
    with progress_bar("muon", enabled=enabled) as show:
        show(STEP)
        show.wait(WAIT)
        show.say(WAIT)
        show.say(ANSWER)
    said = capsys.readouterr()
    assert said.err == f"{WAIT}\n{ANSWER}\n"
    assert said.out == ""


def test_the_bar_has_the_share_of_waiting(terminal):
    waited = Progress(step=3, steps=9, train_loss=2.5, eval_loss=2.25, wait_share=0.0123)
    with progress_bar("muon") as show:
        show(waited)
    assert "loss 2.500, evaluation 2.250, waits 1.2 % of the time" in terminal.getvalue()


def test_without_a_terminal_the_line_of_an_evaluation_has_the_share_of_waiting(capsys):
    with progress_bar("muon") as show:
        show(Progress(step=3, steps=9, train_loss=2.5, eval_loss=2.25, wait_share=0.5))
    assert capsys.readouterr().out == "muon: step 3/9, evaluation loss 2.2500, waits 50.0 % of the time\n"
