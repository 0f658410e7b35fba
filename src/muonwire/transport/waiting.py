"""For whom a transport waits and since when, for displays to ask, and in words where it takes long.

A transport enters a wait around each call that blocks; that costs two readings of the clock. A watcher, where one is wanted,
is one thread that looks at the current wait once a second.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from muonwire.transport.meter import Meter

# A wait of at least so long is kept for the run's events.
LONG_S = 1.0
# When a watcher says for whom it waits, in seconds from the beginning; after the last one, again at each multiple of it.
SAID_AT_S = (5.0, 15.0, 30.0, 60.0)
_TICK_S = 1.0

Text = str | Callable[[], str]


class Wait:
    """One wait: a context, in which the current thread blocks.

    ``what`` is for whom, as a text or a function that other threads call while the wait lasts; ``peer`` is the name under which
    the meter adds up the seconds, "" for none.
    """

    __slots__ = ("_before", "_waits", "answer", "began_s", "peer", "seconds", "since_s", "what")

    def __init__(self, waits: "Waits", what: Text, peer: str, answer: Text, since_s: float) -> None:
        self._waits = waits
        self._before: Wait | None = None
        self.what = what
        self.peer = peer
        self.answer = answer
        self.since_s = since_s
        self.began_s = since_s
        # Of the whole wait, once it is over; None where it ended with an error.
        self.seconds: float | None = None

    def __enter__(self) -> "Wait":
        waits = self._waits
        self.began_s = time.perf_counter()
        if not self.since_s:
            self.since_s = self.began_s
        self._before, waits.current = waits.current, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        waits = self._waits
        now_s = time.perf_counter()
        if self.peer:
            waits.meter.waited(self.peer, now_s - self.began_s)
        if kind is None:
            self.seconds = now_s - self.since_s
            if now_s - self.began_s >= LONG_S:
                waits.long.append(self)
        waits.current = self._before

    def text(self) -> str:
        """For whom, in words."""
        return _said(self.what)


class Waits:
    """The waits of one transport.

    >>> waits = Waits(Meter(), limit_s=600)
    >>> with waits.on("replica 2 (10.77.0.3)", peer="2"):
    ...     waits.text(now_s=waits.current.since_s + 12)
    'waiting for replica 2 (10.77.0.3) for 12 s (at most 600 s)'
    >>> waits.text(), list(waits.meter.wait_s)
    ('', ['2'])

    Args:
        meter: adds up the seconds by peer.
        limit_s: after which a wait ends with an error; None where nothing ends it.

    Attributes:
        current: the innermost wait that lasts; None: the transport does not wait.
        long: those of at least ``LONG_S`` seconds that are over, for a reader to take out; the last 1000.
    """

    def __init__(self, meter: Meter, *, limit_s: float | None = None) -> None:
        self.meter = meter
        self.limit_s = limit_s
        self.current: Wait | None = None
        self.long: deque[Wait] = deque(maxlen=1000)

    def on(self, what: Text, *, peer: str = "", answer: Text = "", since_s: float = 0.0) -> Wait:
        """A context for a call that blocks.

        Args:
            what: for whom it waits, such as "replica 2 (10.77.0.3)" or "replicas (1 of at least 2 are there)"; a function is called
                by the watcher's thread.
            peer: name to which the seconds are added; default: none.
            answer: what has happened when the wait is over, or a function that says it; default: ``what``, followed by "answered".
            since_s: time.perf_counter() when what is waited for was due; default: now.
        """
        return Wait(self, what, peer, answer, since_s)

    def text(self, *, now_s: float | None = None) -> str:
        """The current wait in words; empty where there is none."""
        wait = self.current
        return "" if wait is None else self.describe(wait, now_s=now_s)

    def describe(self, wait: Wait, *, now_s: float | None = None) -> str:
        """A wait that lasts, in words.

        Args:
            wait: one of these waits.
            now_s: time.perf_counter(). Default: now.
        """
        now_s = time.perf_counter() if now_s is None else now_s
        limit = f" (at most {self.limit_s:g} s)" if self.limit_s else ""
        return f"waiting for {wait.text()} for {now_s - wait.since_s:.0f} s{limit}"


def to_stderr(line: str) -> None:
    """Print a line to standard error at once."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def watching(
    waits: Waits,
    *,
    say: Callable[[str], None] = to_stderr,
    show: Callable[[str], None] | None = None,
    first_s: float = SAID_AT_S[0],
) -> Iterator[None]:
    """Within the block, a thread tells of waits that take long.

    Args:
        waits: of the transport.
        say: gets a line after ``first_s`` seconds, then at growing distances, and one when the wait is over. Default: it is printed
            to standard error.
        show: gets the current text once a second in such a wait, and "" after it; for a progress bar.
        first_s: how long a wait is before it is told of. Default: 5.
    """
    stop = threading.Event()
    tick_s = min(_TICK_S, first_s / 2)

    def watch() -> None:
        told: Wait | None = None
        name, next_s, stopped = "", first_s, False
        while not stopped:
            stopped = stop.wait(tick_s)
            wait, now_s = waits.current, time.perf_counter()
            if told is not None and wait is not told:
                if told.seconds is not None:
                    say(f"{_said(told.answer) or f'{name} answered'} after {told.seconds:.0f} s")
                told, next_s = None, first_s
                if show is not None:
                    show("")
            if stopped or wait is None or now_s - wait.since_s < first_s:
                continue
            if wait is not told:
                told, name = wait, wait.text()
            if show is not None:
                show(waits.describe(wait, now_s=now_s))
            if now_s - wait.since_s >= next_s:
                say(waits.describe(wait, now_s=now_s))
                next_s = _after(now_s - wait.since_s)

    thread = threading.Thread(target=watch, name="muonwire-waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _said(text: Text) -> str:
    return text if isinstance(text, str) else text()


def _after(seconds: float) -> float:
    """When the next line is due.

    >>> _after(5.2), _after(61.0), _after(200.0)
    (15.0, 120.0, 240.0)
    """
    last = SAID_AT_S[-1]
    return next((at for at in SAID_AT_S if at > seconds), (seconds // last + 1) * last)
