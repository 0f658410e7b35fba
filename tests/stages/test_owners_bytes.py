"""What a replica sends and receives in one synchronization, at four, sixteen and sixty-four replicas."""

import pytest
from benchmarks import owners
from benchmarks.owners import traffic

from tests.slow import slow_unless

# Bits a parameter, each way: a bit on the way to the owners, and the entropy of a sum of R signs (3.05 at 16, 4.05 at 64), or a bit
# again, on the way back; with frames, scales, tables and padding.
MOST_BITS = {
    ("lossless", 16): 4.2,
    ("lossless", 64): 5.3,
    ("recompressed", 16): 2.2,
    ("recompressed", 64): 2.2,
}


@pytest.mark.parametrize(
    ("means", "replicas"), slow_unless(lambda _, means, replicas: replicas == 16, MOST_BITS)
)
def test_a_synchronization_costs_about_the_same_however_many_replicas_there_are(means, replicas):
    # Sixteen keep within it even where the overheads of a small model's parts weigh more.
    (found,) = traffic(means, replicas, size="pico" if replicas == 16 else "nano")
    assert found["parameters"] >= (120_000 if replicas == 16 else 450_000)
    assert found["egress_bits"] <= MOST_BITS[means, replicas]
    assert found["received_bits"] <= MOST_BITS[means, replicas]
    # Nothing is left out: each sends its part to all others, and each gets them.
    assert found["egress_bits"] >= (1 - 1 / replicas) * (2 if means == "recompressed" else 4)


def test_a_gather_costs_a_bit_for_each_peer():
    (found,) = traffic("gather", 16, size="pico")
    assert 15 < found["egress_bits"] < 15.5


# What is known of the sums before is checked on made signs in test_owners and codec/test_sums.
@pytest.mark.slow
def test_so_it_does_with_real_gradients_whose_signs_agree(monkeypatch):
    """From the second synchronization on, when the sums of the one before are known.

    All receive what all send, so that this holds for sending on average; a replica whose part has longer sums sends more.
    """
    monkeypatch.setattr(owners, "INTERVAL", 5)
    first, second = owners.traffic("lossless", 16, synchronizations=[1, 2])
    assert second["received_bits"] <= MOST_BITS["lossless", 16] < first["received_bits"]
    assert second["egress_bits"] <= MOST_BITS["lossless", 16] + 0.05 < first["egress_bits"]
