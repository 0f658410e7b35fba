"""How tensors are cut into shards, who owns them, and what owners tell."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from muonwire.errors import UsageError
from muonwire.optim import nested, shards
from muonwire.transport.shards import Cut


@given(size=st.integers(0, 9), count=st.integers(1, 5), dim=st.integers(0, 1))
def test_shards_are_cut_as_torch_cuts_them(size, count, dim):
    shape = (size, 3) if dim == 0 else (3, size)
    whole, cut = torch.arange(3 * size).view(shape), Cut(shape=shape, dim=dim, count=count)
    theirs, _ = Shard(dim)._split_tensor(whole, count, with_padding=False)
    for place, shard in enumerate(theirs):
        assert torch.equal(cut.of(whole, place).reshape(-1), shard.reshape(-1))
        assert cut.of(whole, place).shape == cut.shard_shape(place)
        assert cut.numel(place) == shard.numel()


@given(costs=st.lists(st.integers(1, 20), max_size=12), count=st.integers(1, 4))
def test_owners_have_about_as_much(costs, count):
    found = shards.owners(costs, count)
    loads = [sum(c for c, o in zip(costs, found, strict=True) if o == place) for place in range(count)]
    # Whoever has more than another got the last of it when it had no more.
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(owned=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), max_size=12), limit=st.integers(1, 20))
def test_buckets_hold_every_tensor_once_and_no_more_than_their_limit(owned, limit):
    sizes, owner = [size for size, _ in owned], [place for _, place in owned]
    found = shards.buckets(sizes, owner, limit)
    assert sorted(i for bucket in found for i in bucket) == list(range(len(owned)))
    for bucket in found:
        for place in set(owner):
            mine = [sizes[i] for i in bucket if owner[i] == place]
            assert sum(mine) <= limit or len(mine) == 1


def test_what_owners_tell_keeps_numbers_tensors_and_their_order_in_memory():
    column_major = torch.arange(6.0).view(2, 3).T
    told = {
        "step": 3,
        "rate": 0.1,
        "start": column_major,
        "empty": torch.zeros(0, 2, dtype=torch.bfloat16),
        "part": torch.arange(8)[::2],
        "names": ["a", None, True],
    }
    read = nested.unpacked(nested.packed(told))
    assert list(read) == list(told)
    assert (read["step"], read["rate"], read["names"]) == (3, 0.1, ["a", None, True])
    for key in ("start", "empty", "part"):
        assert torch.equal(read[key], told[key])
        assert read[key].dtype is told[key].dtype
    assert read["start"].stride() == column_major.stride()
    with pytest.raises(UsageError, match="type object cannot be told"):
        nested.packed([object()])
