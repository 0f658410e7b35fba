"""The payload format: its document, and what a reader does with bytes from outside."""

import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire import codec
from muonwire.codec import payload as payloads
from muonwire.codec.text import PARTS
from muonwire.errors import PayloadError, UsageError

DOCUMENT = (Path(__file__).parents[2] / "docs" / "payload.md").read_text()


def sealed(rest):
    """A payload whose checksum is right."""
    return struct.pack("<2sBI", b"MW", 2, zlib.crc32(rest)) + rest


def varint(value):
    return payloads.varint(value)


def table(*tensors, count=None, text=b"float32"):
    """Everything behind the checksum, from (dtype code, shape, length) of each tensor."""
    rest = varint(len(text)) + text + varint(len(tensors) if count is None else count)
    for code, shape, length in tensors:
        rest += bytes((code, len(shape))) + b"".join(map(varint, (*shape, length)))
    return rest


def test_the_example_of_the_document_is_what_is_written():
    block = re.search(r"<!-- example -->\n```text\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    written = "".join(re.match(r"(?:[0-9a-f]{2} ?)*", line)[0] for line in block.splitlines())
    x = torch.tensor([[0.0, 8, -1, 2], [-4, 1, 1, 6]])
    text = "topk(k=2) | sign(scale=tensor)"
    body = codec.parse(text).encode_body(x).body
    assert bytes.fromhex(written) == payloads.pack(text, [((2, 4), torch.float32, body)])


def test_the_document_names_every_part_and_limit():
    assert [name for name in PARTS if f"`{name}`" not in DOCUMENT] == []
    assert payloads.LARGEST_CODEC_BYTES == 1024
    assert payloads.LARGEST_NUM_TENSORS == 2**17
    assert payloads.LARGEST_NUMEL == 2**30
    assert payloads.LARGEST_NDIM == 8
    assert {c: str(d) for c, d in payloads.DTYPES.items()} == {
        int(code): f"torch.{name}" for code, name in re.findall(r"(\d) ((?:b?float)\d+)[,| ]", DOCUMENT)
    }


SHAPES = st.lists(st.integers(0, 300), max_size=8).map(tuple)
TENSORS = st.lists(
    st.tuples(SHAPES, st.sampled_from(list(payloads.DTYPES.values())), st.binary(max_size=300)), max_size=5
)


@settings(max_examples=50, deadline=None)
@given(tensors=TENSORS, text=st.text(max_size=100), kind=st.sampled_from([bytes, bytearray, memoryview]))
def test_what_is_packed_is_unpacked_and_measured(tensors, text, kind):
    payload = payloads.pack(text, tensors)
    entries = payloads.unpack(kind(payload), codec_text=text, shapes=[shape for shape, _, _ in tensors])
    assert [(e.shape, e.dtype, e.body) for e in entries] == tensors
    assert len(payload) == payloads.num_bytes(text, [(s, d, len(b)) for s, d, b in tensors])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), tensors=TENSORS)
def test_a_payload_has_one_form(data, tensors):
    """Whatever is accepted after a change of its bytes is written again as it was."""
    rest = bytearray(payloads.pack("float32", tensors)[7:])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(rest) - 1))
        rest[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2))
        if not rest:
            return
    payload = sealed(bytes(rest))
    try:
        entries = payloads.unpack(payload)
    except PayloadError:
        return
    length = rest[0]
    text = bytes(rest[1 : 1 + length]).decode()
    assert payloads.pack(text, [(e.shape, e.dtype, e.body) for e in entries]) == payload


HUGE = 2**62


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "0 bytes are fewer than the header's 7"),
        (b"MW\x02", "fewer than the header's 7"),
        (b"MW\x03" + bytes(4), "version 3, this reader knows 2: update the older side"),
        (b"MW\x02" + bytes(5), "checksum 0x00000000 does not match"),
        (sealed(b""), "cut off in its codec length: 1 bytes wanted, 0 left"),
        (sealed(b"\x80" * 10), "varint of its codec length is longer than nine bytes"),
        (sealed(b"\x80\x00"), "varint of its codec length is longer than its value 0 needs"),
        (sealed(varint(HUGE)), f"a codec of {HUGE} bytes; at most 1024"),
        (sealed(b"\x02\xff\xfe\x00"), r"its codec b'\xff\xfe' is not UTF-8"),
        (sealed(table(text=b"\x1b[2J\n")), r"written by codec '\x1b[2J\n', 'float32' is expected"),
        (sealed(table(text=b"a" * 1000)), "aaa'... (1000 in all), 'float32' is expected"),
        (sealed(table(count=2**60)), f"announces {2**60} tensors with 0 bytes left"),
        (sealed(table(count=2) + bytes(5)), "announces 2 tensors with 5 bytes left; each takes at least 3"),
        (sealed(table((0, (), 0))), "dtype code 0 and 0 dimensions; allowed are codes 1, 2, 3, 4"),
        (sealed(table((1, (1,) * 9, 0))), "dtype code 1 and 9 dimensions"),
        (sealed(table((1, (HUGE,) * 8, 0))), "over 1073741824 elements"),
        (sealed(table((1, (0, HUGE, HUGE), 0))), "over 1073741824 elements"),
        (sealed(table((1, (2**30,), 0), (1, (), 0))), "with tensor 1 of shape () it is over 1073741824"),
        (sealed(table((1, (2,), HUGE))), f"cut off in its body of tensor 0: {HUGE} bytes wanted, 0 left"),
        (sealed(table((1, (2,), 8)) + bytes(9)), "1 bytes follow its last tensor"),
    ],
)
def test_hostile_headers_are_refused_with_what_was_found_and_without_allocating(payload, says):
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match=re.escape(says)) as raised:
            payloads.unpack(payload, codec_text="float32")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The message and its traceback; the least any of these payloads announces to hold is 2 GB or not there at all.
    assert peak < 100_000
    assert len(str(raised.value)) < 400


def test_the_limit_is_the_callers():
    payload = codec.parse("float32").encode(torch.zeros(10, 10))
    assert codec.parse("float32").decode(payload, largest_numel=100).shape == (10, 10)
    with pytest.raises(PayloadError, match="over 99 elements"):
        codec.parse("float32").decode(payload, largest_numel=99)
    # Shapes that the reader expects are its own limit.
    assert len(payloads.unpack(payload, shapes=[(10, 10)], largest_numel=1)) == 1


def test_reordered_and_repeated_tensors_do_not_fit_the_shapes_that_are_expected():
    a, b = ((2, 3), torch.float32, bytes(24)), ((3, 2), torch.float32, bytes(24))
    for wrong in ([b, a], [a, a], [a, b, b], [a]):
        with pytest.raises(PayloadError, match="expected"):
            payloads.unpack(payloads.pack("float32", wrong), shapes=[(2, 3), (3, 2)])


def test_values_that_the_dtype_cannot_hold_are_refused():
    body = codec.parse("float32").encode_body(torch.tensor([1e6])).body
    payload = payloads.pack("float32", [((1,), torch.float16, body)])
    with pytest.raises(PayloadError, match=r"not finite in torch\.float16"):
        codec.parse("float32").decode(payload)


@pytest.mark.parametrize(
    ("text", "tensors"),
    [
        ("float32", [((1,), torch.int8, b"")]),
        ("float32", [((1,) * 9, torch.float32, b"")]),
        ("a" * 1025, []),
    ],
)
def test_what_the_format_cannot_hold_is_not_packed(text, tensors):
    with pytest.raises(UsageError, match="at most"):
        payloads.pack(text, tensors)


def test_many_small_tensors_take_linear_time_and_memory():
    tensors = [((), torch.float32, b"\0\0\0\0")] * 5_000
    payload = payloads.pack("float32", tensors)
    tracemalloc.start()
    try:
        assert len(payloads.unpack(payload)) == len(tensors)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Entry, shape, body and list slots: under half a kilobyte a tensor.
    assert peak < 500 * len(tensors)
