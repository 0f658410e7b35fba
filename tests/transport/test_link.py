import pytest

from muonwire.errors import UsageError
from muonwire.transport import Link


@pytest.mark.parametrize(
    ("text", "rate", "latency"),
    [
        ("10mbit/50ms", 10, 0.05),
        ("1gbit", 1000, 0),
        ("56kbit/0.2s", 0.056, 0.2),
        ("2.5Mbit/100us", 2.5, 1e-4),
    ],
)
def test_links_parse(text, rate, latency):
    link = Link.parse(text)
    assert link.rate_mbit_s == pytest.approx(rate)
    assert link.latency_s == pytest.approx(latency)
    again = Link.parse(str(link))
    assert (again.rate_mbit_s, again.latency_s) == pytest.approx((link.rate_mbit_s, link.latency_s))


@pytest.mark.parametrize(
    "text", ["", "fast", "10", "10mb", "10mbit/", "10mbit/50", "-1mbit", "0mbit", "10mbit/50ms/x"]
)
def test_what_is_no_link_says_how_to_write_one(text):
    with pytest.raises(UsageError, match=r"link: .*"):
        Link.parse(text)


@pytest.mark.parametrize(
    ("text", "written", "up", "down"),
    [
        ("20mbit:200mbit/40ms", "20mbit:200mbit/40ms", 20, 200),
        ("0.5Mbit:1gbit", "0.5mbit:1000mbit/0ms", 0.5, 1000),
        ("10mbit:10mbit/5ms", "10mbit/5ms", 10, 10),
    ],
)
def test_rates_up_and_down_may_differ(text, written, up, down):
    link = Link.parse(text)
    assert (link.rate_mbit_s, link.received_mbit_s) == pytest.approx((up, down))
    assert str(link) == written
    assert Link.parse(str(link)) == link


@pytest.mark.parametrize(
    "text", ["20mbit:/40ms", ":20mbit", "20:200mbit", "20mbit:0mbit", "1mbit:2mbit:3mbit"]
)
def test_bad_pairs_of_rates_are_refused(text):
    with pytest.raises(UsageError, match="link: "):
        Link.parse(text)


def test_each_direction_has_the_time_of_its_own_rate():
    link = Link.parse("8mbit:80mbit/100ms")
    assert link.seconds(egress_bytes=1e6, received_bytes=3e6, num_messages=1) == pytest.approx(1.1)
    assert link.seconds(egress_bytes=1e5, received_bytes=3e6, num_messages=1) == pytest.approx(0.4)


def test_the_busier_direction_sets_the_time():
    link = Link.parse("8mbit/100ms")
    assert link.seconds(egress_bytes=1e6, received_bytes=3e6, num_messages=2) == pytest.approx(3.2)
