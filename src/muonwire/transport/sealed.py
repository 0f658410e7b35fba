"""Sealed links: a stream under tags to every other replica, over messages that a process group carries.

For each peer one thread always waits for the next message, so that a peer that did not get what it needs is answered while
this replica computes; another keeps what is being sent until it has left. Operations wait for streams, never for messages.
"""

import atexit
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonwire.errors import ExchangeError, ReplicaLostError
from muonwire.transport.message import FIELDS, LARGEST_BYTES, Refusal
from muonwire.transport.secret import Secret
from muonwire.transport.stream import Piece, Stream

# Buffers that wait for a peer's messages: what can be on its way while one is looked at.
_DEPTH = 4
# Messages to a peer that are being sent at one time: pieces wait for room, and answers to questions are put off.
_MOST_SENDING = 8
_GOODBYE_S = 10.0
# For messages that may come after any time: whoever waits for what they bring has a time limit of its own.
_ENDLESS, _SHORT = timedelta(days=365), timedelta(milliseconds=1)
_JOIN_S = 2.0
_LAST_WORDS = 4

# Starts sending (True) to a peer, or receiving (False), a buffer; what it returns is given to the function that waits for it.
Start = Callable[[bool, int, Tensor], Any]
Wait = Callable[[Any, timedelta], None]
Notice = Callable[[int, Refusal, int], None]


class Extra(NamedTuple):
    """Bytes besides the pieces of streams, each once: greetings, questions, answers, what was refused or came twice."""

    sent: int
    received: int


class _Link:
    """The stream to one peer, its buffers, and the two threads that serve it."""

    def __init__(
        self, stream: Stream, start: Start, wait: Wait, notice: Notice, ended: Callable[[], None]
    ) -> None:
        self.stream = stream
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self._start, self._wait, self._notice, self._ended = start, wait, notice, ended
        self._sending: deque[Any] = deque()
        self._waiting: deque[tuple[Any, Tensor]] = deque()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Start; a peer that is gone already is an error of the first operation, as one that goes later is."""
        with self.changed, self._failing():
            for _ in range(_DEPTH):
                self._await(torch.empty(LARGEST_BYTES, dtype=torch.uint8))
        for work, name in ((self._receive, "receive"), (self._let_go, "send")):
            thread = threading.Thread(
                target=self._guard, args=(work,), name=f"{name} {self.stream.peer}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        with self.changed, self._failing():
            self.pay()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Within the block, under the lock, an error of the connection is the link's failure."""
        try:
            yield
        except ReplicaLostError as error:
            self.failure = self.failure or error

    def stop(self) -> None:
        """Let the threads end at their next message; what still arrives is nobody's."""
        with self.changed:
            self._stopped = True
            self.changed.notify_all()

    def join(self, within_s: float) -> bool:
        """Whether the threads have ended in this time."""
        deadline = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def cut(self) -> None:
        """Wake a thread that waits for a message which does not come; it ends the connections of the whole group."""
        for handle, _ in list(self._waiting):
            with suppress(ReplicaLostError):
                # Waiting too short a time is the one way to end another wait.
                self._wait(handle, _SHORT)

    def pay(self) -> None:
        """Send what the stream owes, as far as there is room; under the lock."""
        while len(self._sending) < _MOST_SENDING:
            made = self.stream.owed()
            if made is None:
                return
            self._send(made)

    def send(self, piece: Piece, deadline: float) -> None:
        """Send a piece once the link is established and there is room."""
        with self.changed:
            self.await_change(
                lambda: self.stream.established and len(self._sending) < _MOST_SENDING, deadline
            )
            self._send(self.stream.seal(piece))

    def take(self, deadline: float) -> bytearray:
        """The next message of the peer's stream."""
        with self.changed:
            self.await_change(lambda: bool(self.stream.inbox), deadline)
            return self.stream.inbox.popleft()

    def drain(self, deadline: float) -> None:
        """Wait until all that is being sent has left."""
        with self.changed:
            self.await_change(lambda: not self._sending, deadline)

    def say_goodbye(self) -> None:
        """Tell the peer that this end has written all."""
        # A peer that has left already needs to hear nothing.
        with self.changed, suppress(ReplicaLostError):
            self.stream.close()
            self.pay()

    def await_goodbye(self, deadline: float) -> None:
        """Stay until the peer needs nothing of this end any more."""
        with self.changed:
            # A peer that is gone, or silent, has all that it came for: this is the end of the last operation.
            self.changed.wait_for(
                lambda: self.failure is not None or (self._gone and not self._sending),
                max(0.0, deadline - time.monotonic()),
            )

    @property
    def _gone(self) -> bool:
        return self.stream.ended and self.stream.delivered

    def await_change(self, ready: Callable[[], bool], deadline: float) -> None:
        while not ready():
            if self.failure is not None:
                # Where the other end saw the secrets differ first, it is gone now.
                raise self.stream.mismatch() or self.failure
            if self._gone or self._stopped:
                raise ReplicaLostError(f"replica {self.stream.peer} has ended", rank=self.stream.peer)
            left = deadline - time.monotonic()
            if left <= 0:
                refused = sum(self.stream.refused.values())
                raise self.stream.mismatch() or ReplicaLostError(
                    f"replica {self.stream.peer} did not answer in time ({refused} messages that came as its own were refused)",
                    rank=self.stream.peer,
                )
            self.changed.wait(left)

    def _send(self, made: bytearray) -> None:
        # Number and place in the channel belong together: both under the lock.
        self._sending.append(self._start(True, self.stream.peer, torch.frombuffer(made, dtype=torch.uint8)))
        self.changed.notify_all()

    def _await(self, buffer: Tensor) -> None:
        # A message that is shorter than these must not be taken for the one before it.
        buffer[: FIELDS.size] = 0
        self._waiting.append((self._start(False, self.stream.peer, buffer), buffer))

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()
        finally:
            self._ended()

    def _receive(self) -> None:
        while True:
            handle, buffer = self._waiting.popleft()
            self._wait(handle, _ENDLESS)
            with self.changed:
                if self._stopped:
                    return
                try:
                    refusal = self.stream.receive(buffer.numpy().data)
                except ExchangeError:
                    self._say_last_words()
                    raise
                if refusal is not None:
                    self._notice(self.stream.peer, refusal, self.stream.refused[refusal])
                self.pay()
                self.changed.notify_all()
                if self._gone:
                    return
                # Under the lock, so that nothing is started once the link is stopped.
                self._await(buffer)

    def _say_last_words(self) -> None:
        """Let the other end count as many refusals as this one, so that both end with the same error."""
        for _ in range(_LAST_WORDS if self.stream.mismatch() else 0):
            self.stream.greet_again()
            self.pay()

    def _let_go(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._sending or self._stopped)
                if not self._sending:
                    return
                handle = self._sending[0]
            self._wait(handle, _ENDLESS)
            with self.changed:
                self._sending.popleft()
                if not self._stopped:
                    self.pay()
                self.changed.notify_all()


class SealedLinks:
    """A sealed link to every other replica.

    Args:
        secret: of all replicas of the run.
        run: name of the run; the same on all replicas.
        epoch: number of this group of replicas, which changes whenever it is formed anew; the same on all replicas.
        rank: of this replica.
        world_size: number of replicas.
        start: starts to send or to receive a buffer, and returns at once.
        wait: waits for what ``start`` returned, for at most so long, which may be for ever; raises ReplicaLostError where the time
            or the connection ends.
        notice: is told the peer, the reason and their number so far when a message is refused.
    """

    def __init__(
        self,
        secret: Secret,
        *,
        run: str,
        epoch: int,
        rank: int,
        world_size: int,
        start: Start,
        wait: Wait,
        notice: Notice,
    ) -> None:
        self.secret = secret
        self.run = run
        self._links = {
            peer: _Link(
                Stream(secret, run=run, epoch=epoch, rank=rank, peer=peer),
                start,
                wait,
                notice,
                self._thread_ended,
            )
            for peer in range(world_size)
            if peer != rank
        }
        self._counted = Extra(0, 0)
        self._lock = threading.Lock()
        self._threads = 2 * len(self._links)
        for link in self._links.values():
            link.begin()
        atexit.register(self._end_threads)

    def send(self, outgoing: Mapping[int, Iterable[bytes | memoryview]], deadline: float) -> None:
        """Send to each peer one message, given in parts.

        Raises:
            ReplicaLostError, ExchangeError: a link ended.
        """
        joined: dict[int, list[Piece]] = {}
        for peer, parts in outgoing.items():
            link = self._links[peer]
            with link.changed:
                joined[peer] = link.stream.pieces(*parts)
        for i in range(max(map(len, joined.values()), default=0)):
            for peer, pieces in joined.items():
                if i < len(pieces):
                    self._links[peer].send(pieces[i], deadline)

    def take(self, peer: int, deadline: float) -> bytearray:
        """The next message that ``peer`` wrote.

        Raises:
            ReplicaLostError, ExchangeError: its link ended.
        """
        return self._links[peer].take(deadline)

    def drain(self, deadline: float) -> None:
        """Wait until all that is being sent has left this replica."""
        for link in self._links.values():
            link.drain(deadline)

    def close(self, *, within_s: float = _GOODBYE_S) -> None:
        """Say goodbye to all, and stay until they need nothing of this replica any more."""
        deadline = time.monotonic() + within_s
        for link in self._links.values():
            link.say_goodbye()
        for link in self._links.values():
            link.await_goodbye(deadline)
        self.stop()
        for link in self._links.values():
            link.join(_JOIN_S)

    def stop(self) -> None:
        """End without a word: the connections are gone, or are about to go."""
        for link in self._links.values():
            link.stop()

    def _thread_ended(self) -> None:
        with self._lock:
            self._threads -= 1
            if not self._threads:
                atexit.unregister(self._end_threads)

    def _end_threads(self) -> None:
        """End every thread before the interpreter does: one that wakes up after it ends the process with an abort."""
        self.stop()
        for link in self._links.values():
            if not link.join(0.0):
                link.cut()
        for link in self._links.values():
            link.join(_JOIN_S)

    def refused(self) -> dict[int, Counter[Refusal]]:
        """How many messages were refused, by the peer that they came as, and why."""
        return {peer: Counter(link.stream.refused) for peer, link in self._links.items()}

    def new_extra(self) -> Extra:
        """Bytes besides the pieces since the last call."""
        sent = sum(link.stream.extra_sent_bytes for link in self._links.values())
        received = sum(link.stream.extra_received_bytes for link in self._links.values())
        before, self._counted = self._counted, Extra(sent, received)
        return Extra(sent - before.sent, received - before.received)
