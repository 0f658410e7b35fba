"""Sums of signs: exact, at the entropy that is left when the last sums are known, and hostile until they are read."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire.codec import parse, sums
from muonwire.errors import PayloadError


@st.composite
def made(draw):
    """R, sums of R signs, and what is known of them."""
    replicas = draw(st.integers(1, 70))
    counts = draw(st.lists(st.integers(0, replicas), min_size=1, max_size=400).map(np.array))
    level = st.integers(0, sums.LARGEST_LEVEL)
    levels = draw(st.none() | st.lists(level, min_size=len(counts), max_size=len(counts)))
    known = None if levels is None else np.array(levels, dtype=np.uint8)
    return replicas, counts, sums.Known(count=len(counts), levels=known)


@settings(max_examples=200, deadline=None)
@given(made=made())
def test_sums_come_back_as_they_were(made):
    replicas, counts, known = made
    body = sums.pack(counts, replicas, known)
    # The reader has made its own of what it knows.
    again = sums.Known(count=known.count, levels=known.levels)
    found, senders = sums.unpack(body, len(counts), largest=replicas, known=again)
    assert senders == replicas
    assert np.array_equal(found, counts)


@pytest.mark.parametrize("replicas", [2, 4, 8, 16, 64])
def test_sums_of_independent_signs_take_their_entropy(replicas):
    """Within one in two hundred, four bytes before the words, two of their length and a coder's ends."""
    count = 7200
    counts = np.random.default_rng(0).binomial(replicas, 0.5, count)
    found = len(sums.pack(counts, replicas))
    assert found <= 1.005 * count * sums.entropy_bits(replicas) / 8 + 12
    assert found == pytest.approx(sums.estimate_bytes(count, replicas), rel=0.01)


def beta_binomial_entropy(replicas, alpha, beta):
    """By the definition, with logarithms of gamma functions, which the coder does without."""

    def log_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    logs = [
        math.log(math.comb(replicas, n)) + log_beta(n + alpha, replicas - n + beta) - log_beta(alpha, beta)
        for n in range(replicas + 1)
    ]
    assert sum(map(math.exp, logs)) == pytest.approx(1)
    return -sum(math.exp(log) * log for log in logs) / math.log(2)


@pytest.mark.parametrize("replicas", [4, 16, 64, 300])
def test_sums_take_the_entropy_that_the_last_sums_leave(replicas):
    """With probabilities spread evenly the last sum n' leaves a beta distribution with α = 1 + n', β = 1 + R - n'."""
    count, random = 30_000, np.random.default_rng(1)
    probabilities = random.uniform(size=count)
    last, counts = (random.binomial(replicas, probabilities) for _ in range(2))
    known = sums.Known(count=count, levels=sums.levels_of(last, replicas))
    bits = 8 * len(sums.pack(counts, replicas, known)) / count
    left = [beta_binomial_entropy(replicas, 1 + n, 1 + replicas - n) for n in range(replicas + 1)]
    # Levels are rounded to 1/32, and middle, slope and concentration to a byte each.
    assert bits == pytest.approx(np.mean(np.array(left)[last]), rel=0.02)
    assert bits < 8 * len(sums.pack(counts, replicas)) / count - (0.2 if replicas == 4 else 0.4)


@pytest.mark.parametrize("replicas", [1, 3, 64])
def test_sums_that_are_all_alike_take_next_to_nothing(replicas):
    for n in {0, replicas}:
        counts = np.full(10_000, n)
        assert len(sums.pack(counts, replicas)) < 40
        found, _ = sums.unpack(sums.pack(counts, replicas), 10_000, largest=replicas)
        assert np.array_equal(found, counts)


def test_levels_do_not_depend_on_the_number_of_replicas():
    for replicas in (1, 2, 3, 16, 64, 1000):
        levels = sums.levels_of(np.arange(replicas + 1), replicas)
        assert (levels[0], levels[-1]) == (0, sums.LARGEST_LEVEL)
        shares = np.arange(replicas + 1) / replicas
        assert np.abs(levels / sums.LARGEST_LEVEL - shares).max() <= 0.5 / sums.LARGEST_LEVEL


def test_a_distribution_is_that_of_its_definition():
    for replicas, middle, concentration in ((5, 100, 0), (64, 200, 20), (64, 3, 44), (300, 128, 71)):
        spread = sums.Spread(middle=middle, slope=0, concentration=concentration)
        mean = spread.means[0]
        total = (1 + concentration % 4 / 4) * 2.0 ** (concentration // 4 - 3)
        weights = spread.weights(replicas, mean)
        found = weights / weights.sum()
        entropy = -(found[found > 0] * np.log2(found[found > 0])).sum()
        assert entropy == pytest.approx(
            beta_binomial_entropy(replicas, mean * total, (1 - mean) * total), rel=1e-6
        )
        assert found @ np.arange(replicas + 1) == pytest.approx(mean * replicas)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), made=made())
def test_hostile_sums_are_sums_or_payload_errors(data, made):
    replicas, counts, known = made
    body = bytearray(sums.pack(counts, replicas, known))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = bytes(body[: data.draw(st.integers(0, len(body)))]) if data.draw(st.booleans()) else bytes(body)
    tracemalloc.start()
    try:
        again, senders = sums.unpack(body, len(counts), largest=70, known=known)
    except PayloadError:
        pass
    else:
        assert len(again) == len(counts)
        assert again.min() >= 0
        assert again.max() <= senders <= 70
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 * len(counts) + 256 * len(body) + (1 << 17)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\xff\xff\xff\xff\xff\x0f\x80\x00\x10\x00", "at most 70 replicas have sent"),
        (b"\x47\x80\x00\x10\x00", "at most 70 replicas have sent"),
        (b"\x00\x80\x00\x10\x00", "sums of 0 signs"),
        (b"\x03\x80\x00", "spread of sums"),
        (b"\x03\x80\x00\x48\x00", "concentration 72; the largest is 71"),
        (b"\x03\x80\x00\x10\x00\x00", "1 bytes follow"),
        (b"\x03\x80\x00\x10\x09" + 9 * b"\x01", "hold more than 10 sums"),
    ],
)
def test_what_nobody_can_have_sent_is_refused(body, says):
    with pytest.raises(PayloadError, match=says):
        sums.unpack(body, 10, largest=70)


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 16, 64, 1000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-30, 0.3])
def test_the_mean_has_the_bits_of_a_sum_in_any_order(replicas, scale):
    generator = torch.Generator().manual_seed(replicas)
    signs = torch.randint(2, (replicas, 50), generator=generator) * 2 - 1
    shared = torch.tensor(scale).bfloat16().float()
    codec = parse("sign(scale=shared)")
    bodies = [
        codec.encode_body(s.float(), state={"scale": shared}).body
        for s in signs[torch.randperm(replicas, generator=generator)]
    ]
    gathered = codec.mean_bodies(bodies, (50,))
    own = sums.mean((signs > 0).sum(0).numpy(), replicas, scale=shared.item())
    assert torch.equal(gathered.view(torch.int32), own.view(torch.int32))
