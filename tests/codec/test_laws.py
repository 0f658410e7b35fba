"""The laws of every codec, over shapes, dtypes and values that nobody would choose."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire import codec
from muonwire.codec import payload as payloads
from muonwire.codec.text import PARTS
from muonwire.codec.transform import Rows
from muonwire.stages import EF14, Context, Exchange, MatrixLayout
from muonwire.transport import ProcessGroupTransport, SingleReplica
from tests.codec.test_codecs import TEXTS
from tests.replicas import run_replicas

ROOT = Path(__file__).parents[2]
# 2**50: a quantizer may square values and add up thousands of them, which float32 holds up to 2**128.
KINDS = {
    "gaussian": lambda g, shape: torch.randn(shape, generator=g),
    "ties": lambda g, shape: torch.randint(-2, 3, shape, generator=g).float(),
    "zeros": lambda g, shape: torch.zeros(shape) * torch.randn(shape, generator=g).sign(),
    "subnormal": lambda g, shape: torch.randn(shape, generator=g) * 1e-41,
    "tiny": lambda g, shape: torch.randn(shape, generator=g) * 2.0**-120,
    "huge": lambda g, shape: torch.randn(shape, generator=g) * 2.0**50,
    "mixed": lambda g, shape: (
        torch.randn(shape, generator=g) * 2.0 ** torch.randint(-140, 50, shape, generator=g)
    ),
    "one": lambda g, shape: (
        torch.nn.functional.one_hot(torch.tensor(0), max(math.prod(shape), 1))
        .float()[: math.prod(shape)]
        .reshape(shape)
    ),
}
SHAPES = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 70)),
    st.sampled_from([(), (1,), (130,), (0, 3), (3, 0), (2, 3, 4, 5), (64, 64), (1, 128), (128, 1)]),
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(kind, shape, dtype, seed):
    x = KINDS[kind](torch.Generator().manual_seed(seed), shape)
    # Decoded values may be some times larger, and the residual of a float16 parameter is float16.
    largest = min(torch.finfo(dtype).max / 64, 2.0**60)
    return x.clamp(-largest, largest).to(dtype)


def bits(x):
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


def test_no_part_is_without_a_codec_in_the_list():
    used = {part for text in TEXTS for part in PARTS if part in text}
    default = codec.Pipeline()
    assert set(PARTS) - used <= {default.transform.name, default.select.name, default.pack.name}


def test_the_document_names_every_part():
    document = (ROOT / "docs" / "codec.md").read_text()
    assert [name for name in PARTS if f"| `{name}`" not in document and f", `{name}`" not in document] == []


@settings(max_examples=25, deadline=None)
@given(
    shape=SHAPES,
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    now=st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize("text", TEXTS)
def test_the_laws_of_a_codec(text, shape, kind, dtype, seed, now):
    chosen = codec.parse(text)
    x = drawn(kind, shape, dtype, seed)
    encoded = chosen.encode_body(x, seed=now, state=chosen.init(shape))
    sent = encoded.decoded
    assert sent.shape == x.shape
    assert sent.isfinite().all()

    # Whoever decodes the body has what the sender subtracts, to the last bit, the signs of zeros included.
    decoded = chosen.decode_body(encoded.body, shape)
    assert torch.equal(bits(decoded), bits(sent.to(decoded.dtype)))

    # sent + kept == input, up to the rounding of the one subtraction that makes `kept`: in float32 or wider, then into the
    # residual's dtype, whose smallest step is all that is left where the difference is below its normal range.
    kept = x.clone().sub_(sent)
    exact = x.double() - sent.double()
    eps = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps / 2
    step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    # float64, in which this is checked, rounds as well.
    slack = torch.finfo(torch.float64).eps * (x.double().abs() + sent.double().abs())
    assert ((kept.double() - exact).abs() <= eps * exact.abs() + step + slack).all()

    # What is selected is the input itself, and the rest is untouched.
    if isinstance(chosen.transform, Rows):
        selected = encoded.selected.to(dtype)
        assert ((selected == x) | (selected == 0)).all()
        if text.endswith("float32") and dtype != torch.float64:
            assert torch.equal(selected, sent.to(dtype))

    # Its length is what is reported.
    payload = payloads.pack(str(chosen), [(shape, dtype, encoded.body)])
    assert len(payload) == payloads.num_bytes(str(chosen), [(shape, dtype, len(encoded.body))])
    assert torch.equal(bits(chosen.decode(payload)), bits(decoded.to(dtype)))


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_stage_sends_and_keeps_is_the_signal(text):
    stage = Exchange(codec=codec.parse(text), feedback=EF14())
    # Where replicas take turns, a single one sends all.
    used = stage.codec.for_replicas(1)
    params = [torch.zeros(8, 24), torch.zeros(7), torch.zeros(0, 2)]
    states = [stage.init(p) for p in params]
    updates = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in params]
    context = Context(lr=0.1, step=1, transport=SingleReplica(), layouts=[MatrixLayout()] * 3)
    request = stage.send(updates, params, states, context)
    shapes = [tuple(p.shape) for p in params]
    entries = payloads.unpack(request.payload, codec_text=str(used), shapes=shapes)
    lengths = [(e.shape, e.dtype, len(e.body)) for e in entries]
    assert len(request.payload) == payloads.num_bytes(str(used), lengths)
    for entry, update, state in zip(entries, updates, states, strict=True):
        assert torch.equal(state["residual"], update - used.decode_body(entry.body, entry.shape))
    if used.select.shared or isinstance(used.select, codec.All):
        assert len(request.payload) == used.estimate_bytes(*shapes)


# What a process decodes: payloads from here, decoded there with other hashes and another number of threads.
ELSEWHERE = """
import hashlib, json, sys, torch
from muonwire import codec
torch.set_num_threads(2)
for text, payloads in json.load(sys.stdin):
    for payload in payloads:
        decoded = codec.parse(text).decode(bytes.fromhex(payload))
        print(hashlib.sha256(decoded.numpy().tobytes()).hexdigest())
"""


def test_other_processes_decode_the_same_bits():
    xs = [drawn(kind, (24, 40), torch.float32, 5) for kind in KINDS]
    made = [(text, [codec.parse(text).encode(x) for x in xs]) for text in TEXTS]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=json.dumps([(text, [p.hex() for p in payloads_]) for text, payloads_ in made]),
        env=os.environ
        | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [
        hashlib.sha256(codec.parse(text).decode(p).numpy().tobytes()).hexdigest()
        for text, payloads_ in made
        for p in payloads_
    ]
    assert done.stdout.split() == here


def _metered():
    transport = ProcessGroupTransport()
    x = torch.randn(24, 40, generator=torch.Generator().manual_seed(transport.rank))
    counted = []
    for text in TEXTS:
        payload = codec.parse(text).encode(x)
        before = transport.meter.total.sent_bytes
        # A purpose of its own: no room for a payload of the size of the last one is kept.
        transport.gather(payload, purpose=text)
        counted.append((transport.meter.total.sent_bytes - before, len(payload)))
    return counted


def test_the_meter_counts_what_encode_returned():
    # A gather adds its 16-byte frame header.
    for counted in run_replicas(_metered, 2):
        assert [sent - length for sent, length in counted] == [16] * len(TEXTS)
