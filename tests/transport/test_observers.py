"""A replica that observes takes the others' outcome, and counts in none."""

import pytest
import torch

from muonwire.errors import ExchangeError
from muonwire.transport import Flag, run_threads


def observing(*ranks):
    """A worker's transport, which observes on these ranks."""

    def prepared(rank, exchange):
        transport = exchange()
        transport.observes = rank in ranks
        return transport

    return prepared


def test_payloads_of_updates_are_those_of_the_others():
    def worker(rank, exchange):
        transport = observing(1)(rank, exchange)
        updates = transport.gather(bytes([rank]) * (rank + 1))
        return updates, transport.gather(bytes([rank]), purpose="control")

    for updates, control in run_threads(worker, replicas=3):
        assert updates == [b"\x00", b"\x02\x02\x02"]
        # What is no update is everybody's.
        assert control == [b"\x00", b"\x01", b"\x02"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_over_the_others(dtype):
    values = torch.tensor([[1.0, 2.0, 4.0], [100.0, 100.0, 100.0], [3.0, 6.0, 8.0]], dtype=dtype)

    def worker(rank, exchange):
        transport = observing(1)(rank, exchange)
        (mean,) = transport.mean([values[rank]])
        (control,) = transport.mean([values[rank]], purpose="control")
        return mean.clone(), control.clone(), transport.agreed

    for mean, control, agreed in run_threads(worker, replicas=3):
        assert mean.tolist() == [2.0, 4.0, 6.0]
        assert torch.equal(control, values.float().mean(0).to(dtype))
        # It is not a flag for all to act on.
        assert Flag.OBSERVES not in agreed


def test_where_all_observe_all_get_an_error():
    def worker(rank, exchange):
        with pytest.raises(ExchangeError, match="all 2 replicas observe"):
            observing(0, 1)(rank, exchange).gather(b"")

    run_threads(worker, replicas=2)
