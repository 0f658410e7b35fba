"""The link of a plan: what texts it takes, and the seconds that an exchange takes on it."""

import pytest

from muonwire.errors import UsageError
from muonwire.plan.rates import FIRST_WINDOW_BYTES, PACKET_SHARE, Rates


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"up": "0mbit"}, "up is '0mbit'; give a positive rate"),
        ({"up": "20mbit/40ms"}, "up is '20mbit/40ms'"),
        ({"up": "20mbit:200mbit"}, "up is '20mbit:200mbit'"),
        ({"down": "fast"}, "down is 'fast'"),
        ({"down": "-1mbit"}, "down is '-1mbit'"),
        ({"latency": "4"}, "latency is '4'; give the delay one way in us, ms or s"),
    ],
)
def test_bad_texts_are_named(given, says):
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        Rates.parse(**{"up": "1mbit", "down": "1mbit", "latency": "0ms", **given})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_bad_numbers_are_named(value):
    with pytest.raises(UsageError, match="up_mbit_s"):
        Rates(up_mbit_s=value, down_mbit_s=1)


def test_the_slower_way_decides_and_packets_count_where_the_rate_is_theirs():
    rates = Rates(up_mbit_s=20, down_mbit_s=200)
    one = rates.seconds(egress_bytes=1e6, received_bytes=1e6, num_messages=1, peers=4)
    assert one == pytest.approx(8e6 / 20e6 * PACKET_SHARE)
    assert rates.seconds(egress_bytes=0, received_bytes=1e6, num_messages=1, peers=4) == pytest.approx(
        one / 10
    )


def test_after_a_rest_tcp_begins_with_ten_segments_a_peer():
    # 8 Mbit/s are 1 MB/s, and a round trip takes 0.2 s: 200 kB fill it.
    rates = Rates(up_mbit_s=8, down_mbit_s=8, latency_s=0.1, goodput=True)
    traffic = {"egress_bytes": 1e6, "received_bytes": 1e6, "num_messages": 1, "peers": 1}
    assert rates.seconds(**traffic) == pytest.approx(1.1)
    # Windows of 14, 29, 58 and 116 kB leave the rest of a round trip each.
    lost = sum(0.2 - FIRST_WINDOW_BYTES * 2**i / 1e6 for i in range(4))
    assert rates.seconds(**traffic, rested_s=1.0) == pytest.approx(1.1 + lost)
    # One that fits into the first window loses nothing.
    short = traffic | {"egress_bytes": 1e4, "received_bytes": 1e4}
    assert rates.seconds(**short, rested_s=1.0) == rates.seconds(**short)
    # Many peers fill the link at once.
    assert rates.seconds(**{**traffic, "peers": 20}, rested_s=1.0) == pytest.approx(1.1)
