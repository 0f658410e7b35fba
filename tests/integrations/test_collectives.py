"""What a framework says between replicas: the same on all of them, counted as control, and one error where they are not alike."""

import pytest
import torch

from muonwire.errors import UsageError
from muonwire.integrations.collectives import Collectives
from muonwire.transport import run_threads


def on_replicas(function, replicas=3):
    """What the function of rank and Collectives returns on each replica, or the text of its UsageError; and the meter."""

    def worker(rank, make):
        transport = make()
        try:
            return function(rank, Collectives(transport, who="test")), transport.meter
        except UsageError as error:
            return str(error), transport.meter

    return run_threads(worker, replicas=replicas)


def test_values_are_gathered_in_rank_order_and_counted_as_control():
    for found, meter in on_replicas(lambda rank, said: said.gather("a place", b"%d" % rank)):
        assert found == [b"0", b"1", b"2"]
        assert set(meter.by_purpose) == {"control"}
        assert meter.training.sent_bytes == 0 < meter.total.sent_bytes


@pytest.mark.parametrize("value", [None, True, 1.5, "runs/a", {"a": [1, "b"]}])
def test_all_get_what_one_broadcasts(value):
    found = on_replicas(lambda rank, said: said.broadcast(value if rank == 1 else "mine", source=1))
    assert [its for its, _ in found] == [value] * 3


def test_all_get_the_same_kinds_of_what_json_gives_back_otherwise():
    found = on_replicas(lambda rank, said: said.broadcast({1: (2, 3)}, source=1))
    assert [its for its, _ in found] == [{"1": [2, 3]}] * 3


def test_what_json_cannot_hold_is_one_error_on_all():
    for text, _ in on_replicas(lambda rank, said: said.broadcast({1, 2}, source=2)):
        assert "cannot broadcast: replica 2 has a set" in text


@pytest.mark.parametrize(
    ("how", "expected"),
    [("mean", [1, 3]), ("avg", [1, 3]), ("sum", [3, 9]), ("max", [2, 5]), ("min", [0, 1])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_are_reduced(how, expected, dtype):
    def reduce(rank, said):
        return said.reduce(torch.tensor([rank, 2 * rank + 1], dtype=dtype), how)

    for found, _ in on_replicas(reduce):
        assert found.tolist() == expected
        assert found.dtype is (torch.float32 if how in ("mean", "avg") and dtype is torch.int64 else dtype)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_tensors_of_any_shape_are_stacked(shape):
    def stack(rank, said):
        return said.stack(
            torch.full(shape, rank, dtype=torch.float64).transpose(0, -1) if shape else torch.tensor(rank)
        )

    for found, _ in on_replicas(stack):
        assert found.shape == (3, *shape[::-1])
        assert all((found[rank] == rank).all() for rank in range(3))


def test_tensors_of_shapes_of_their_own_are_gathered():
    for found, _ in on_replicas(lambda rank, said: said.each(torch.full((rank, 2), rank), group=None)):
        assert [its.tolist() for its in found] == [[], [[1, 1]], [[2, 2]] * 2]
        assert found[0].shape == (0, 2)


def test_decisions_are_everybodys():
    assert [found for found, _ in on_replicas(lambda rank, said: said.decisions(rank == 1))] == [
        [False, True, False]
    ] * 3


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda rank, said: said.gather(f"barrier {rank // 2}"),
            "different places (replica 0: barrier 0; replica 1",
        ),
        (lambda rank, said: said.stack(torch.zeros(2 + rank // 2)), "the shapes (2,), (2,), (3,) by rank"),
        (lambda rank, said: said.reduce(torch.zeros(2), "median"), "the reduction is 'median'"),
        (
            lambda rank, said: said.agree("save", "is full" * (rank == 1), remedy="more"),
            "cannot save: replica 1 is full",
        ),
        (
            lambda rank, said: said.check_data(
                {"x": [torch.tensor(rank % 2)], "y": "text"}, remedy="shuffle"
            ),
            "replicas 0 and 2 drew the same first batch",
        ),
    ],
)
def test_replicas_that_are_not_alike_are_one_error_on_all(act, words):
    for text, _ in on_replicas(act):
        assert words in text


def test_batches_that_differ_or_hold_no_tensors_are_good():
    good = [
        lambda rank, said: said.check_data([torch.tensor(rank), torch.zeros(2)], remedy=""),
        lambda rank, said: said.check_data({"text": "the same"}, remedy=""),
        lambda rank, said: said.agree("save", "", remedy=""),
    ]
    assert all(found is None for act in good for found, _ in on_replicas(act))
