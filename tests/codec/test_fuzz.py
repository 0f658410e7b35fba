"""A short run of the fuzzer (`make fuzz` is the long one), and that it finds what it looks for."""

import re
import shlex
import time

import pytest
import torch
from fuzz import codec as fuzz
from fuzz.mutations import Message

from muonwire.codec import Pipeline, payload
from muonwire.codec.quantize import Float32, Sign
from muonwire.codec.quantize.base import Decoded
from tests.codec.test_codecs import TEXTS

CASES = 3000


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_payloads_decode_or_are_payload_errors(text):
    outcomes = fuzz.run_codec(text, cases=max(60, CASES // len(TEXTS)), seed=1)
    assert outcomes.failures == []
    assert outcomes.counts["decoded"] > 0
    # The table and the decoders were both reached.
    assert len([o for o in outcomes.counts if o.startswith("refused")]) > 5


def _wrong_error(self, data, count, layout):
    raise IndexError("out of range")


def _wrong_size(self, data, count, layout):
    torch.zeros(1 << 19)
    return Decoded(torch.ones(count))


def _wrong_memory(self, data, count, layout):
    bytearray(1 << 21)
    return Decoded(torch.ones(count))


def _wrong_value(self, data, count, layout):
    return Decoded(torch.full((count,), torch.nan))


def _wrong_count(self, data, count, layout):
    return Decoded(torch.ones(count, dtype=torch.float64))


def _wrong_bound(self, data, count, layout):
    return Decoded(torch.full((count,), 2.0), 1.0)


def _wrong_time(self, data, count, layout):
    end = time.process_time() + 1.1 * fuzz.SLOW_S
    while time.process_time() < end:
        pass
    return Decoded(torch.ones(count))


@pytest.mark.parametrize(
    ("decode", "says"),
    [
        (_wrong_error, "IndexError: out of range"),
        (_wrong_size, "allocates [0-9]{7} bytes"),
        (_wrong_memory, "allocates [0-9]{7} bytes"),
        (_wrong_value, "PayloadError|does not decode what the codec itself wrote"),
        (_wrong_count, "decoded to torch.float64"),
        (_wrong_bound, "reaches 2, 1 was its bound|does not decode what the codec itself wrote"),
        (_wrong_time, r"takes [\d.]+ s"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_fuzzer_finds_a_broken_decoder(monkeypatch, decode, says):
    message = fuzz.corpus("float32", fuzz.Random(0))[1]
    monkeypatch.setattr(Float32, "decode", decode)
    monkeypatch.setattr(fuzz, "SLOW_S", 0.3)
    monkeypatch.setattr(fuzz, "corpus", lambda text, random: [message])
    failures = fuzz.run_codec("float32", cases=1, seed=0).failures
    assert failures
    assert re.search(says, failures[0][0])


def _killed(self, data, count, layout):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_a_failure_with_its_payload_and_a_command(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(Sign, "decode", _killed)
    assert fuzz.fuzz(["sign(scale=none)"], cases=20, seed=0, out=tmp_path) == 1
    path = tmp_path / "failure-0.bin"
    assert payload.unpack(path.read_bytes(), codec_text="sign(scale=none)")
    out = capfd.readouterr().out
    assert "ends its process (-9)" in out
    monkeypatch.undo()
    # The command reproduces: with the decoder as it should be it decodes.
    command = shlex.split(re.search(r"python -m fuzz.codec (.*)", out)[1])
    assert fuzz.main(command) == 0
    assert capfd.readouterr().out == "decoded\n"


def test_messages_are_written_as_the_format_says():
    x = torch.ones(2, 3)
    whole = Pipeline().encode(x)
    tensor = fuzz.Field(dtype_code=1, shape=(2, 3), body=Pipeline().encode_body(x).body)
    assert fuzz.sealed(Message(text=b"float32", tensors=(tensor,)).rest()) == whole
