"""Calls that are timed take turns, and only their first results are kept."""

import itertools

import torch

from muonwire.lab.measures.timing import median_times


def test_calls_take_turns_and_the_first_result_is_kept():
    order, numbers = [], itertools.count()

    def call(name):
        order.append(name)
        return torch.tensor(next(numbers))

    found = median_times({n: lambda n=n: call(n) for n in ("a", 2)}, turns=3, keep=int)
    assert order == ["a", 2] * 3
    assert {name: kept for name, (_, kept) in found.items()} == {"a": 0, 2: 1}
    assert all(seconds > 0 for seconds, _ in found.values())
