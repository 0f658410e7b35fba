"""Shared randomness: the published generator, and what is drawn from it."""

import math

import numpy as np
import pytest
import torch

from muonwire.codec import random


def philox(counter, key):
    """Philox4x64-10 as Salmon et al. (2011), section 3.3, define it, in Python's integers."""
    full = (1 << 64) - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & full, (p0 >> 64) ^ c3 ^ k1, p0 & full
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & full, (k1 + 0xBB67AE8584CAA73B) & full
    return [c0, c1, c2, c3]


def test_words_are_philox_of_the_seed_and_the_streams_checksum():
    # The first line of the known answers that the authors publish with Random123.
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox((0, 0, 0, 0), (0, 0)) == known
    key = (0xDEADBEEF, 0xAB55007B)  # CRC-32 of "hadamard"
    expected = philox((1, 0, 0, 0), key) + philox((2, 0, 0, 0), key)
    assert [int(w) for w in random.words(0xDEADBEEF, "hadamard", 8)] == expected
    assert [int(w) for w in random.words(0xDEADBEEF, "hadamard", 3)] == expected[:3]
    assert not set(expected) & {int(w) for w in random.words(0xDEADBEEF, "lowrank", 8)}


def test_signs_and_fractions_are_bits_of_words():
    words = [int(w) for w in random.words(5, "x", 2)]
    signs = [1 - 2 * (words[i // 64] >> (i % 64) & 1) for i in range(100)]
    assert random.signs(5, "x", 100).tolist() == signs
    assert random.uniform(5, "x", 2).tolist() == [(w >> 11) / 2**53 for w in words]
    assert random.signs(5, "x", 0).numel() == random.uniform(5, "x", 0).numel() == 0


def test_all_subsets_are_equally_likely():
    """Each of the C(5, 2) subsets N p times within 5 standard deviations, √(N p (1 − p)); so do the singles and pairs."""
    groups = 20_000
    items = random.subsets(3, "x", groups, 5, 2).view(groups, 2) - 5 * torch.arange(groups).unsqueeze(1)
    assert (items[:, 0] < items[:, 1]).all()
    assert (items >= 0).all()
    assert (items < 5).all()
    counts = torch.bincount(items[:, 0] * 5 + items[:, 1])
    assert (counts > 0).sum() == 10
    p = 1 / 10
    assert (counts[counts > 0] - groups * p).abs().max() < 5 * math.sqrt(groups * p * (1 - p))


@pytest.mark.parametrize(
    ("num_groups", "group_numel", "k"), [(1, 1000, 1), (1, 997, 996), (7, 13, 13), (3, 5, 0)]
)
def test_subsets_have_exactly_k_items(num_groups, group_numel, k):
    items = random.subsets(1, "x", num_groups, group_numel, k)
    assert torch.equal(items, items.unique())
    assert (torch.bincount(items // group_numel, minlength=num_groups) == k).all()


def test_equal_draws_are_taken_in_the_order_of_items(monkeypatch):
    def few(seed, stream, count):
        return np.array([0x0000000200000001, 0x0000000100000001, 0x0000000100000001], dtype="<u8")[:count]

    monkeypatch.setattr(random, "words", few)
    # The draws are 1, 2, 1 and 1, 1, 1.
    assert random.subsets(0, "x", 2, 3, 2).tolist() == [0, 2, 3, 4]
    assert random.subsets(0, "x", 2, 3, 1).tolist() == [0, 3]
