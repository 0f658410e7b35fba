"""Laws of the selections: which entries are sent, and what that costs."""

import hashlib
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire import codec
from tests.codec.test_codecs import made

SHAPES = [(6, 8), (13, 17), (1, 11), (11, 1), (1, 1), (31, 4), (4, 31)]


def coarse(shape, seed=0):
    """Small integers: squares and their sums are exact, and many are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def divisor(size, limit):
    return max(d for d in range(1, min(size, limit) + 1) if size % d == 0)


def first_of_largest(norms, k):
    return set(sorted(range(len(norms)), key=lambda i: (-norms[i], i))[:k])


def share(numel, density):
    return min(numel, max(1, round(density * numel)))


def rows_kept(x, density):
    chosen = first_of_largest([sum(v * v for v in row) for row in x.tolist()], share(len(x), density))
    return torch.tensor([[i in chosen] * x.shape[1] for i in range(len(x))])


def columns_kept(x, density):
    return rows_kept(x.mT, density).mT


def tiles_kept(x, density, size=4):
    height, width = divisor(x.shape[0], size), divisor(x.shape[1], size)
    corners = [(i, j) for i in range(0, x.shape[0], height) for j in range(0, x.shape[1], width)]
    norms = [x[i : i + height, j : j + width].square().sum().item() for i, j in corners]
    kept = torch.zeros(x.shape, dtype=torch.bool)
    for tile in first_of_largest(norms, share(len(corners), density)):
        i, j = corners[tile]
        kept[i : i + height, j : j + width] = True
    return kept


ORACLES = [
    (codec.TopRows, rows_kept, {}),
    (codec.TopColumns, columns_kept, {}),
    (codec.TopBlocks, tiles_kept, {"size": 4}),
]


@pytest.mark.parametrize(("kind", "oracle", "options"), ORACLES)
@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from(SHAPES), density=st.floats(0.05, 1.0), seed=st.integers(0, 1000))
def test_the_items_of_largest_norm_are_sent_and_of_equal_ones_the_first(
    kind, oracle, options, shape, density, seed
):
    x = coarse(shape, seed)
    select = kind(density=density, **options)
    items = select.choose(x)
    groups = select.groups(*shape)
    assert items.shape == (groups.count,)
    assert torch.equal(items, items.unique())
    positions = select.expand(items, *shape)
    expected = oracle(x, density).flatten().nonzero().view(-1)
    assert torch.equal(positions, expected)
    assert select.count(*shape) == len(positions)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 7), (4, 4)])
@pytest.mark.parametrize("shape", [*SHAPES, (3,), (2, 1)])
def test_n_of_each_m_are_sent_and_the_rest_that_fills_no_group(n, m, shape):
    x = coarse(shape)
    flat = x.flatten().tolist()
    expected = []
    for start in range(0, len(flat), m):
        group = [abs(v) for v in flat[start : start + m]]
        kept = first_of_largest(group, n) if len(group) == m else range(len(group))
        expected += sorted(start + i for i in kept)
    select = codec.NOfM(n=n, m=m)
    grid = (1, *shape) if len(shape) == 1 else shape
    assert select.expand(select.choose(x.view(grid)), *grid).tolist() == expected
    assert select.count(*grid) == len(expected)
    decoded = codec.Pipeline(select=select).encode_body(x).decoded.flatten()
    assert decoded.tolist() == [v if i in expected else 0 for i, v in enumerate(flat)]


@pytest.mark.parametrize("text", ["toprows(k=1)", "topcolumns(k=1)", "topblocks(size=2, k=1)"])
@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_norms_whose_squares_no_float32_holds_are_told_apart(text, magnitude):
    x = torch.full((4, 4), magnitude)
    x[2:, 2:] *= 3
    x[3, 3] *= 2
    decoded = codec.parse(f"{text} | float32").encode_body(x).decoded
    assert decoded[3, 3] == x[3, 3]


@pytest.mark.parametrize(
    "text",
    [
        "randomk(density=1)",
        "randomk(k=99)",
        "turns(parts=1)",
        "toprows(density=1)",
        "topcolumns(k=99)",
        "topblocks(density=1)",
        "nm(n=4)",
    ],
)
@pytest.mark.parametrize("shape", [(13, 17), (7,), (), (2, 3, 4)])
def test_a_selection_of_everything_is_no_selection(text, shape):
    x = made(shape)
    encoded = codec.parse(f"{text} | float32").encode_body(x)
    assert torch.equal(encoded.decoded, x)
    seed_bytes = 4 if "randomk" in text or "turns" in text else 0
    assert len(encoded.body) == seed_bytes + 4 * x.numel()


def test_what_one_index_stands_for():
    """num_groups, group_numel and k, from which a packer knows that log2 C(group_numel, k) bits a group are enough."""
    grid = (12, 10)
    cases = {
        codec.RandomK(k=3): (12, 10, 3),
        codec.RandomK(density=0.25): (1, 120, 30),
        codec.Turns(parts=7): (1, 120, 18),
        codec.TopRows(density=0.25): (1, 12, 3),
        codec.TopColumns(k=4): (1, 10, 4),
        codec.TopBlocks(size=4, k=2): (1, 3 * 5, 2),  # Tiles of 4 by 2.
        codec.NOfM(n=2, m=7): (17, 7, 2),
    }
    for select, expected in cases.items():
        groups = select.groups(*grid)
        assert (groups.num_groups, groups.group_numel, groups.k) == expected
    assert codec.NOfM(n=2, m=7).count(*grid) == 17 * 2 + 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.05, 1.0))
def test_rows_and_columns_commute_with_permutations_of_both(seed, density):
    generator = torch.Generator().manual_seed(seed)
    # A norm of its own for each row and column, so that permuted sums, which round differently, order alike.
    x = torch.randn(9, 7, generator=generator) * torch.arange(1, 10).unsqueeze(1) * torch.arange(2, 9)
    rows, columns = torch.randperm(9, generator=generator), torch.randperm(7, generator=generator)
    for select in (codec.TopRows(density=density), codec.TopColumns(density=density)):
        chosen = codec.Pipeline(select=select)
        direct = chosen.encode_body(x).decoded[rows][:, columns]
        assert torch.equal(direct, chosen.encode_body(x[rows][:, columns]).decoded)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_n_of_m_commutes_with_permutations_of_groups_and_within_them(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 4, generator=generator)
    groups = torch.randperm(10, generator=generator)
    inside = torch.stack([torch.randperm(4, generator=generator) for _ in range(10)])
    chosen = codec.Pipeline(select=codec.NOfM(n=2, m=4))
    direct = chosen.encode_body(x).decoded[groups].gather(1, inside)
    assert torch.equal(direct, chosen.encode_body(x[groups].gather(1, inside)).decoded)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_tiles_commute_with_permutations_of_tiles(seed):
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(3, 4, 5, 4, generator=generator)
    down, across = torch.randperm(3, generator=generator), torch.randperm(5, generator=generator)
    chosen = codec.Pipeline(select=codec.TopBlocks(size=4, k=4))
    direct = chosen.encode_body(tiles.reshape(12, 20)).decoded.view(3, 4, 5, 4)[down][:, :, across]
    permuted = chosen.encode_body(tiles[down][:, :, across].reshape(12, 20)).decoded
    assert torch.equal(direct, permuted.view(3, 4, 5, 4))


@pytest.mark.parametrize(("text", "count"), [("randomk(density=0.1)", 22), ("randomk(k=3)", 39)])
def test_a_random_selection_costs_a_seed_and_its_values(text, count):
    x = made((13, 17))
    chosen = codec.parse(f"{text} | float32")
    encoded = chosen.encode_body(x, seed=0xFFFFFFFF)
    assert len(encoded.body) == 4 + 4 * count == chosen.estimate_body_bytes((13, 17))
    sent = encoded.decoded != 0
    assert sent.sum() == count
    assert torch.equal(encoded.decoded, torch.where(sent, x, 0))
    if "k=" in text:
        assert (sent.sum(1) == 3).all()


def test_random_selections_of_rounds_are_independent_and_unbiased():
    """Each entry is sent in N k / n of N rounds, within 5 standard deviations; (n / k) decoded averages to x."""
    rounds, x = 3000, made((5, 8))
    chosen = codec.parse("randomk(density=0.2) | float32")
    decoded = torch.stack([chosen.encode_body(x, seed=s).decoded for s in range(rounds)])
    sent = (decoded != 0).float()
    assert (sent.sum((1, 2)) == 8).all()
    p = 8 / 40
    assert (sent.sum(0) - rounds * p).abs().max() < 5 * math.sqrt(rounds * p * (1 - p))
    # The variance of (n / k) x · [sent] is x² (n / k − 1).
    assert ((decoded.mean(0) / p - x).abs() < 5 * x.abs() * math.sqrt((1 / p - 1) / rounds)).all()
    # Consecutive rounds share p of their entries: 3000 hypergeometric overlaps of mean 8 p and variance below 8 p (1 − p).
    overlap = (sent[1:] * sent[:-1]).sum((1, 2)).mean()
    assert abs(overlap - 8 * p) < 5 * math.sqrt(8 * p * (1 - p) / rounds)


def test_another_process_draws_the_same():
    program = (
        "import hashlib; from muonwire.codec import RandomK; "
        "items = RandomK(density=0.01).draw(1000, 1031, seed=0xABCDEF01); "
        "print(hashlib.sha256(items.numpy().astype('<i8').tobytes()).hexdigest())"
    )
    theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    items = codec.RandomK(density=0.01).draw(1000, 1031, seed=0xABCDEF01)
    ours = hashlib.sha256(items.numpy().astype("<i8").tobytes()).hexdigest()
    assert theirs.stdout.strip() == ours
    # What this seed draws on every machine, for as long as payloads of this version are read.
    assert ours == "bfac908c737a4f6d721cca704855608e2d1dafe3f53f3aacefc2c8848fe62fac"


def test_senders_of_one_round_send_the_same_entries():
    """So that the mean over senders is the mean over replicas, on the entries that are sent."""
    chosen = codec.parse("randomk(density=0.3) | float32")
    bodies = [chosen.encode_body(made((9, 10), seed=s), seed=6).body for s in range(3)]
    replicas, senders = (chosen.mean_bodies(bodies, (9, 10), over=over) for over in ("replicas", "senders"))
    assert torch.equal(replicas, senders)
    assert (replicas != 0).sum() == 27


@pytest.mark.parametrize("shape", [(12, 10), (7,), (1,), (), (0, 3), (2, 3, 4)])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_turns_send_every_entry_once_in_as_many_rounds_as_parts(shape, parts):
    chosen = codec.parse(f"turns(parts={parts}) | float32")
    x = made(shape) + 10
    count = -(-x.numel() // parts)
    sent = torch.zeros(shape)
    for seed in range(2**32 - parts, 2**32):
        encoded = chosen.encode_body(x, seed=seed)
        assert len(encoded.body) == 4 + 4 * count
        assert (encoded.decoded != 0).sum() == count
        sent += encoded.decoded != 0
    # Short parts are filled up with entries of others.
    assert bool((sent >= 1).all())
    assert sent.sum() == count * parts < x.numel() + parts
