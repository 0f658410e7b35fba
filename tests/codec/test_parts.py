"""The messages between a replica and an owner: small, whole, and hostile until they are read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire.codec import parts
from muonwire.errors import PayloadError

SHAPES = st.lists(st.lists(st.integers(0, 300), max_size=4).map(tuple), max_size=6)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), shapes=SHAPES, text=st.text(max_size=60))
def test_what_is_packed_is_unpacked_and_measured(data, shapes, text):
    bodies = [data.draw(st.binary(max_size=300)) for _ in shapes]
    message = parts.pack(text, shapes, bodies)
    assert parts.unpack(message, codec_text=text, shapes=shapes) == bodies
    assert len(message) == parts.num_bytes([len(b) for b in bodies])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shapes=SHAPES)
def test_whatever_is_changed_is_noticed(data, shapes):
    bodies = [data.draw(st.binary(max_size=40)) for _ in shapes]
    message = parts.pack("float32", shapes, bodies)
    kind = data.draw(st.sampled_from(["change", "cut", "add", "shapes", "codec"]))
    text = "float32"
    if kind == "change" and message:
        at = data.draw(st.integers(0, len(message) - 1))
        message = message[:at] + bytes([message[at] ^ data.draw(st.integers(1, 255))]) + message[at + 1 :]
    elif kind == "cut" and message:
        message = message[: data.draw(st.integers(0, len(message) - 1))]
    elif kind == "shapes":
        shapes = [*shapes, (3,)]
    elif kind == "codec" and shapes:
        text = "bfloat16"
    else:
        message += b"\0"
    with pytest.raises(PayloadError):
        parts.unpack(message, codec_text=text, shapes=shapes)


def test_two_pieces_of_nine_hundred_bytes_take_nine_more():
    assert parts.num_bytes([700, 200]) == 900 + 5 + 2 + 2


def test_a_refusal_is_an_error_with_its_reason_wherever_it_is_read():
    for shapes in ([], [(3,)]):
        with pytest.raises(PayloadError, match=r"refuses what it was sent: from replica 1: ä"):
            parts.unpack(parts.refuse("from replica 1: ä"), codec_text="float32", shapes=shapes)
    assert len(parts.refuse("ü" * 10_000)) <= 1 + parts.LARGEST_REFUSAL_BYTES
    with pytest.raises(PayloadError) as caught:
        parts.unpack(b"\0" + b"\xff" * (1 << 20), codec_text="float32", shapes=[])
    assert len(str(caught.value)) < 5000
