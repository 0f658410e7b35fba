"""The kernel's counters of a replica's network against the meter, with means by owners."""

import subprocess

import pytest
from benchmarks.owners import GLOO_BYTES, counted, judged

from muonwire.compare.hosts import lacking
from tests.commands import ForkingPopen


@pytest.mark.skipif(bool(lacking()), reason=f"needs a network for each replica: {lacking()}")
@pytest.mark.parametrize("means", ["lossless", "recompressed"])
def test_the_kernel_counts_what_the_meter_counts(means, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", ForkingPopen)
    found = counted(means, 3, size="nano", synchronizations=3)
    assert [record["rank"] for record in found] == [0, 1, 2]
    for record in found:
        assert record["egress_bytes"] > 3 * 1.3 * record["parameters"] / 8
        for way in ("tx", "rx"):
            # What is left over are a few packets of other sizes: addresses asked for, selective acknowledgements.
            assert 0.99 <= record[f"{way}_over_known"] <= 1.01
            assert (
                1.0
                <= record[f"{way}_over_meter"]
                <= 1.02 + record[f"{way}_resent_bytes"] / record["egress_bytes"]
            )


def test_what_was_sent_again_counts_at_both_ends():
    record = {"messages": 10, "egress_bytes": 9000, "received_bytes": 9000}
    record |= {"tx_packets": 10, "rx_packets": 10, "rx_bytes": 660 + 9000 + 10 * GLOO_BYTES}
    sender = {**record, "tx_bytes": 660 + 9000 + 10 * GLOO_BYTES + 500, "resent_bytes": {"b": 500}}
    receiver = {**record, "tx_bytes": 660 + 9000 + 10 * GLOO_BYTES, "resent_bytes": {"a": 0}}
    receiver["rx_bytes"] += 500
    for judgement in judged([sender, receiver], addresses=["a", "b"]):
        assert judgement["tx_over_known"] == judgement["rx_over_known"] == 1
