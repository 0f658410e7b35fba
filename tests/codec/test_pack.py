"""Packers: round trips, what they cost over log2 C(n, k), and bytes from outside."""

import math

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire.codec import Ans, Ranks, parse
from muonwire.codec.pack.ans import PRECISION, gap_model
from muonwire.codec.pack.fields import (
    digits_bytes,
    pack_digits,
    pack_fields,
    pack_words,
    unpack_digits,
    unpack_fields,
    unpack_words,
)
from muonwire.codec.select import Groups
from muonwire.errors import PayloadError, UsageError

PACKERS = [Ans(), Ranks()]


def drawn(groups, seed=0):
    """Items chosen uniformly."""
    generator = np.random.default_rng(seed)
    rows = [
        np.sort(generator.choice(groups.group_numel, groups.k, replace=False)) + i * groups.group_numel
        for i in range(groups.num_groups)
    ]
    return np.concatenate(rows).astype(np.int64) if rows else np.zeros(0, dtype=np.int64)


def bound_bits(groups):
    """The information in a uniform choice: num_groups · log2 C(n, k)."""
    n, k = groups.group_numel, groups.k
    return (
        groups.num_groups * (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    )


@st.composite
def any_groups(draw):
    group_numel = draw(st.one_of(st.integers(1, 12), st.integers(1, 5000)))
    k = draw(st.one_of(st.just(0), st.just(group_numel), st.integers(0, group_numel)))
    num_groups = draw(st.integers(1, 40 if group_numel <= 12 else 3))
    return Groups(num_groups=num_groups, group_numel=group_numel, k=k)


def usable(packer, groups):
    return not isinstance(packer, Ranks) or Ranks.fits(groups)


@settings(max_examples=200, deadline=None)
@given(groups=any_groups(), seed=st.integers(0, 1000), beyond=st.binary(max_size=6))
def test_every_packer_round_trips(groups, seed, beyond):
    items = drawn(groups, seed)
    for packer in PACKERS:
        if usable(packer, groups):
            data = packer.encode(items, groups)
            decoded, read = packer.decode(data + beyond, groups)
            assert decoded.dtype == np.int64
            assert (decoded == items).all()
            assert read == len(data)


@pytest.mark.parametrize("packer", PACKERS, ids=str)
def test_items_at_the_ends_round_trip(packer):
    """The longest gaps there are, which the ANS coder's tables end before."""
    for n, k in [(1 << 20, 1), (1 << 20, 2), (70_000, 50), (4096, 32), (4096, 4000), (100, 99)]:
        groups = Groups(num_groups=2, group_numel=n, k=k)
        if not usable(packer, groups):
            continue
        first = np.arange(k, dtype=np.int64)
        for inside in (first, first + n - k):
            items = np.concatenate([inside, inside + n])
            decoded, _ = packer.decode(packer.encode(items, groups), groups)
            assert (decoded == items).all()


def test_escapes_round_trip():
    """Nearly all gaps are zero and ten are longer than the table: several escapes in a row."""
    groups = Groups(num_groups=1, group_numel=1 << 20, k=20_000)
    items = np.concatenate([np.arange(20_000 - 10), (1 << 20) - 1 - np.arange(10)[::-1] * 9_000])
    model = gap_model(groups.group_numel, groups.k)
    assert np.diff(items).min() == 1
    assert np.diff(items)[-9:].min() > 3 * model.escape << model.low_bits
    decoded, _ = Ans().decode(Ans().encode(items, groups), groups)
    assert (decoded == items).all()


@pytest.mark.parametrize("k", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("num_groups", [16, 40, 1024])
def test_chosen_of_each_chunk_cost_little_more_than_their_entropy(k, num_groups):
    """Within 3 % of the bound from a tensor of 64 Ki values (16 chunks) on, length and last word included.

    The gaps of a group are coded as if they were independent: 1.8 % at k = 8, 1.3 % at 16, 0.9 % at 32, 0.6 % at 64 (the
    distribution's entropy times k, over log2 C(4096, k)); ranks, where they are used, round to whole bits: 0.66 of 43 at k = 4.
    """
    groups = Groups(num_groups=num_groups, group_numel=4096, k=k)
    bits = 8 * len(Ans().encode(drawn(groups), groups))
    # Below the bound by chance: the sum of some hundred log-probabilities, 2 % at most here.
    assert 0.98 <= bits / bound_bits(groups) <= 1.03


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("numel", [1 << 16, 512 * 2048])
def test_chosen_of_a_tensor_cost_no_more_than_a_per_cent_over_their_entropy(density, numel):
    groups = Groups(num_groups=1, group_numel=numel, k=round(density * numel))
    assert 0.99 <= 8 * len(Ans().encode(drawn(groups, seed=1), groups)) / bound_bits(groups) <= 1.01


def test_few_items_cost_no_more_than_their_rank():
    """3 of 64 items are one of 41664 choices: 15.3 bits."""
    groups = Groups(num_groups=1, group_numel=64, k=3)
    assert len(Ans().encode(drawn(groups), groups)) == 2
    for k in (0, 64):
        empty = Groups(num_groups=3, group_numel=64, k=k)
        assert Ans().encode(drawn(empty), empty) == b""


def test_ranks_number_the_choices():
    groups = Groups(num_groups=1, group_numel=7, k=3)
    items = [Ranks().decode(bytes((rank,)), groups)[0] for rank in range(math.comb(7, 3))]
    assert len({tuple(row) for row in items}) == math.comb(7, 3)
    assert all((np.diff(row) > 0).all() and row[0] >= 0 and row[-1] < 7 for row in items)
    with pytest.raises(PayloadError, match="rank 35 of 35"):
        Ranks().decode(bytes((35,)), groups)
    with pytest.raises(UsageError, match="use ans"):
        Ranks().encode(np.zeros(0, dtype=np.int64), Groups(num_groups=1, group_numel=1 << 20, k=1000))


@pytest.mark.parametrize(("n", "k"), [(4096, 32), (4096, 64), (512 * 2048, 52_429), (1 << 30, 3), (300, 290)])
def test_gap_models_are_the_exact_distribution(n, k):
    """P(gap ≥ g) = C(n − g, k) / C(n, k), in exact integers, at the ends of a few buckets; the frequencies sum to 2^24.

    A bucket's ratio is the one at its middle, to the power of its width: the midpoint rule, wrong by far less than 1 %
    where a bucket is a third of the mean gap at most. Each symbol's frequency is rounded to 2^-24 and has at least that.
    """
    model = gap_model(n, k)

    def survives(bucket):
        g = bucket << model.low_bits
        # Π (n − k − i)/(n − i) for i < g, or the same product with g and k exchanged: whichever is shorter.
        short, long = sorted((g, k))
        return math.exp(sum(math.log1p(-long / (n - i)) for i in range(short)))

    for bucket in {1, min(3, model.escape), max(1, model.escape // 20)}:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(np.array([bucket], dtype=np.int32), model.high)
        words = coder.get_compressed()
        above = 1 - (int(words[0]) if len(words) else 0) / (1 << PRECISION)
        assert above == pytest.approx(survives(bucket), rel=0.01, abs=2 * model.escape / (1 << PRECISION))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bytes_from_outside_are_items_or_payload_errors(data):
    groups = data.draw(any_groups())
    for packer in PACKERS:
        if not usable(packer, groups):
            continue
        if data.draw(st.booleans()):
            content = bytearray(packer.encode(drawn(groups), groups))
            for _ in range(data.draw(st.integers(1, 3)) if content else 0):
                content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            content = bytes(content[: data.draw(st.integers(0, len(content)))])
        else:
            content = data.draw(st.binary(max_size=40))
        try:
            items, read = packer.decode(content, groups)
        except PayloadError:
            continue
        assert 0 <= read <= len(content)
        rows = items.reshape(groups.num_groups, groups.k)
        assert (np.diff(rows, axis=1) > 0).all()
        assert (rows // groups.group_numel == np.arange(groups.num_groups)[:, None]).all()


def test_endless_escapes_end_in_a_payload_error():
    """Words of all ones are the likeliest to decode to the last symbol, the escape."""
    groups = Groups(num_groups=1, group_numel=1 << 20, k=20_000)
    with pytest.raises(PayloadError):
        Ans().decode(pack_words(np.full(10_000, 0xFFFFFFFF, dtype=np.uint32)), groups)


def test_words_left_over_are_noticed():
    groups = Groups(num_groups=1, group_numel=1 << 16, k=655)
    data = Ans().encode(drawn(groups), groups)
    words, _ = unpack_words(data)
    with pytest.raises(PayloadError, match="more than 655 positions"):
        Ans().decode(pack_words(np.concatenate([words[:1], words])), groups)
    with pytest.raises(PayloadError, match="may not be 0"):
        unpack_words(b"\x02\x01\x00")
    with pytest.raises(PayloadError, match="are announced"):
        unpack_words(data[:-1])
    with pytest.raises(PayloadError, match="no length"):
        unpack_words(b"\xff" * 9)


@settings(max_examples=100, deadline=None)
@given(width=st.integers(0, 63), values=st.lists(st.integers(0, (1 << 63) - 1), max_size=40), data=st.data())
def test_fields_and_digits_round_trip(width, values, data):
    fields = np.array(values, dtype=np.int64) & np.int64((1 << width) - 1)
    packed = pack_fields(fields, width)
    assert len(packed) == (len(values) * width + 7) // 8
    assert (unpack_fields(packed, len(values), width) == fields).all()
    base = data.draw(st.one_of(st.integers(1, 70), st.integers(1, 1 << 31)))
    digits = np.array(values, dtype=np.int64) % base
    packed = pack_digits(digits, base)
    assert len(packed) == digits_bytes(len(values), base)
    assert (unpack_digits(packed, len(values), base) == digits).all()
    # Each field, of which there is one for every 63 bits, rounds up to a whole bit; so does the last byte.
    least = len(values) * math.log2(base)
    assert len(packed) * 8 <= least + (least / 32 + 1) + math.log2(base) * (least / 32 + 1) + 8


def test_a_pack_is_written_where_it_is_not_the_default():
    assert str(parse("topk(k=3) | float32 | ans")) == "topk(k=3) | float32"
    assert str(parse("topk(k=3) | float32 | ranks")) == "topk(k=3) | float32 | ranks"


@pytest.mark.parametrize("name", ["bitmap", "bits", "rice"])
def test_a_removed_packer_says_what_replaces_it(name):
    with pytest.raises(UsageError, match=f"'{name}' is a packer of muonwire 0.1; leave it out"):
        parse(f"topk(k=3) | float32 | {name}")
