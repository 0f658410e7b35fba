"""Two ends of a stream, and somebody between them who alters, adds, repeats and swaps messages."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire.errors import ExchangeError
from muonwire.transport import stream as module
from muonwire.transport.message import CONTENT_BYTES, LARGEST_BYTES, START_BYTES, Message, Refusal
from muonwire.transport.secret import Secret
from muonwire.transport.stream import Stream, sealed_bytes

SECRET = Secret(bytes(range(32)))


def ends(secret=SECRET, other=SECRET, **changed):
    common = {"run": "a run", "epoch": 3}
    return [
        Stream(secret, rank=0, peer=1, **common),
        Stream(other, rank=1, peer=0, **{**common, **changed}),
    ]


class Between:
    """Two channels that keep order, and what is done to the messages on them."""

    def __init__(self, streams, tamper=lambda queue, made: queue.append(made)):
        self.streams = streams
        self.tamper = tamper
        self.queues = [deque(), deque()]
        self.buffers = [bytearray(LARGEST_BYTES), bytearray(LARGEST_BYTES)]

    def send(self, end, made):
        self.tamper(self.queues[end], bytes(made))

    def pay(self):
        for end, stream in enumerate(self.streams):
            while (made := stream.owed()) is not None:
                self.send(end, made)

    def turn(self):
        """Deliver one message each way; whether there was any."""
        self.pay()
        moved = False
        for end in (0, 1):
            if self.queues[end]:
                moved = True
                made, buffer = self.queues[end].popleft(), self.buffers[1 - end]
                # As with gloo, a shorter message leaves what was in the buffer; the magic is cleared by the receiver.
                buffer[:52] = bytes(52)
                buffer[: len(made)] = made
                self.streams[1 - end].receive(memoryview(buffer))
        self.pay()
        return moved

    def until(self, ready):
        for _ in range(100_000):
            if ready():
                return
            assert self.turn(), "both wait for ever"
        raise AssertionError("messages without end")

    def operation(self, payloads):
        """Both write a message and get the other's."""
        self.until(lambda: all(s.established for s in self.streams))
        for end, payload in enumerate(payloads):
            for piece in self.streams[end].pieces(payload):
                self.send(end, self.streams[end].seal(piece))
        self.until(lambda: all(s.inbox for s in self.streams))
        return [bytes(s.inbox.popleft()) for s in self.streams]

    def goodbye(self):
        for stream in self.streams:
            stream.close()
        self.until(lambda: all(s.ended for s in self.streams))


def test_where_nobody_tampers_a_piece_travels_once_and_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(module, "CONTENT_BYTES", 100)
    sent = []
    between = Between(ends(), lambda queue, made: (sent.append(len(made)), queue.append(made)))
    between.until(lambda: all(s.established for s in between.streams))
    while between.turn():
        pass
    del sent[:]
    for size in (0, 1, 92, 93, 1000):
        sizes = len(sent)
        assert between.operation([bytes(size), b"x" * size]) == [b"x" * size, bytes(size)]
        while between.turn():
            pass
        pieces = -(-(size + 8) // 100)
        assert len(sent) - sizes == 2 * pieces
        assert sum(sent[sizes:]) == 2 * (size + 8 + pieces * START_BYTES)
    between.goodbye()
    assert all(s.delivered and not s.refused for s in between.streams)


def test_sealed_bytes_are_what_pieces_have():
    stream = ends()[0]
    stream._key = SECRET
    for size in (0, 5, CONTENT_BYTES - 8, CONTENT_BYTES - 7, 3 * CONTENT_BYTES):
        made = [stream.seal(piece) for piece in stream.pieces(bytes(size))]
        assert sum(map(len, made)) == sealed_bytes(size)
        assert max(map(len, made)) <= LARGEST_BYTES


ACTS = ["nothing", "alter", "garbage", "repeat", "swap", "foreign", "copy"]


@settings(max_examples=150, deadline=None)
@given(
    acts=st.lists(st.sampled_from(ACTS), min_size=5, max_size=60),
    quiet=st.integers(0, 6),
    seed=st.integers(0, 1 << 16),
    sizes=st.lists(st.integers(0, 1200), min_size=2, max_size=8),
)
def test_whatever_is_done_on_the_way_both_get_what_the_other_wrote(acts, quiet, seed, sizes):
    """Tampering starts after ``quiet`` messages, so with the greetings themselves, too, and ends with the acts."""
    chance = random.Random(seed)
    left = deque(["nothing"] * quiet + acts)
    seen = []

    def tamper(queue, made):
        act = left.popleft() if left else "nothing"
        seen.append(made)
        if act == "alter":
            at = chance.randrange(len(made))
            made = made[:at] + bytes([made[at] ^ 1 << chance.randrange(8)]) + made[at + 1 :]
        if act in ("garbage", "copy", "repeat", "foreign"):
            added = {
                "garbage": bytes(chance.randrange(256) for _ in range(chance.randrange(200))),
                "copy": made,
                "repeat": chance.choice(seen),
                "foreign": made[:16] + bytes([made[16] ^ 1]) + made[17:],
            }[act]
            order = [added, made] if chance.random() < 0.5 else [made, added]
            queue.extend(order)
            return
        queue.append(made)
        if act == "swap" and len(queue) > 1:
            queue[-1], queue[-2] = queue[-2], queue[-1]

    whole = module.CONTENT_BYTES
    module.CONTENT_BYTES = 100
    try:
        between = Between(ends(), tamper)
        for number, size in enumerate(sizes):
            payloads = [bytes([number, end]) * (size // (1 + end)) for end in (0, 1)]
            assert between.operation(payloads) == payloads[::-1]
        left.clear()
        between.goodbye()
    finally:
        module.CONTENT_BYTES = whole


def quiet_pair():
    between = Between(ends())
    between.operation([b"one", b"two"])
    while between.turn():
        pass
    return between


def receive(stream, made):
    buffer = bytearray(LARGEST_BYTES)
    buffer[: len(made)] = made
    return stream.receive(memoryview(buffer))


def test_every_kind_of_refusal_has_its_name():
    between = quiet_pair()
    first, second = between.streams
    genuine = bytes(first.seal(first.pieces(b"payload")[0]))
    later = bytes(first.seal(first.pieces(b"another")[0]))
    for at in range(len(genuine)):
        made = bytearray(genuine)
        made[at] ^= 0x10
        # Magic, version and marks beyond the known ones; the fields that say whose the message is; the rest is what the tag is for.
        kind = (
            Refusal.MALFORMED
            if at < 4 or at == 6 or at == 7
            else Refusal.FOREIGN
            if 8 <= at < 24
            else Refusal.ALTERED
        )
        assert receive(second, bytes(made)) is kind, at
    assert receive(second, b"") is Refusal.MALFORMED
    assert receive(second, genuine[:70]) is Refusal.ALTERED
    forged = Message(0, 99, 0, 0, 0, b"evil").seal(first._out, Secret(bytes(range(1, 33))))
    assert receive(second, forged) is Refusal.ALTERED
    assert receive(second, later) is None
    assert receive(second, later) is Refusal.REPLAYED
    # Two that changed places: the second is taken, and the first is late; its content comes with an answer.
    assert receive(second, genuine) is Refusal.REPLAYED
    assert not second.inbox
    assert second.refused[Refusal.REPLAYED] == 2
    between.until(lambda: len(second.inbox) == 2)
    assert [bytes(m) for m in second.inbox] == [b"payload", b"another"]


def test_messages_of_another_session_run_epoch_or_direction_are_refused():
    recorded = []
    earlier = Between(ends(), lambda queue, made: (recorded.append(made), queue.append(made)))
    earlier.operation([b"one", b"two"])
    _, second = quiet_pair().streams
    assert {receive(second, made) for made in recorded if made[20] == 0} == {
        Refusal.ALTERED,
        Refusal.REPLAYED,
    }
    assert {receive(second, made) for made in recorded if made[20] == 1} == {Refusal.FOREIGN}
    for changed in ({"run": "other"}, {"epoch": 4}):
        streams = ends(**changed)
        made = streams[0].owed()
        assert receive(streams[1], made) is Refusal.FOREIGN
    assert not second.inbox


def test_a_greeting_of_an_earlier_session_does_not_begin_a_new_one():
    recorded = []
    earlier = Between(ends(), lambda queue, made: (recorded.append(made), queue.append(made)))
    earlier.operation([b"one", b"two"])
    fresh = ends()
    for made in recorded:
        if made[20] == 0:
            receive(fresh[1], made)
    assert not fresh[1].established
    assert Between(fresh).operation([b"a", b"b"]) == [b"b", b"a"]


def test_two_that_have_different_secrets_end_with_one_clear_error():
    between = Between(ends(other=Secret(bytes(range(1, 33)))))
    with pytest.raises(
        ExchangeError, match=r"refused 1000 messages in a row .*malformed|of another run.*--secret-file"
    ):
        between.until(lambda: all(s.established for s in between.streams))


def test_a_flood_without_end_ends_with_one_clear_error(monkeypatch):
    monkeypatch.setattr(module, "MOST_REFUSED", 500)
    _, second = quiet_pair().streams
    for _ in range(499):
        receive(second, b"garbage")
    with pytest.raises(
        ExchangeError, match=r"refused 500 messages in a row from replica 0 \(500 malformed\).*wireguard"
    ):
        receive(second, b"garbage")
