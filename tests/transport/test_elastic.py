"""ElasticTransport before it meets anybody: what it refuses."""

import socket
import threading

import pytest

from muonwire.errors import ExchangeError, UsageError
from muonwire.transport.elastic import ElasticSettings, ElasticTransport
from muonwire.transport.interfaces import Interface


@pytest.mark.parametrize("text", ["", "host", "host:", ":29510", "host:0", "host:70000", "host:port"])
def test_a_lighthouse_is_a_host_and_a_port(text):
    with pytest.raises(UsageError, match="give HOST:PORT"):
        ElasticSettings(lighthouse=text)


def test_places_are_read_in_all_their_forms():
    for text in ("10.0.0.1:29510", "http://10.0.0.1:29510", "http://10.0.0.1:29510/"):
        assert ElasticSettings(lighthouse=text).place() == ("10.0.0.1", 29510)
    assert ElasticSettings(lighthouse="[fd00::1]:29510").place() == ("fd00::1", 29510)


@pytest.mark.parametrize("name", ["min_replicas", "timeout_s", "join_s", "patience_s", "linger_s"])
def test_numbers_are_positive(name):
    with pytest.raises(UsageError, match=f"{name} is 0; it must be positive"):
        ElasticSettings(lighthouse="host:1", **{name: 0})


def test_a_name_has_no_colon():
    with pytest.raises(UsageError, match="has a colon"):
        ElasticSettings(lighthouse="host:1", name="a:b")


def test_a_lighthouse_that_does_not_answer_is_named(free_port):
    with pytest.raises(
        ExchangeError, match=f"a cannot reach the lighthouse 127.0.0.1:{free_port} through lo"
    ):
        ElasticTransport(ElasticSettings(lighthouse=f"127.0.0.1:{free_port}", name="a", timeout_s=1))


def test_a_lighthouse_that_is_being_started_is_waited_for(free_port, monkeypatch):
    public = Interface(name="wan", address="203.0.113.7")
    monkeypatch.setattr("muonwire.transport.elastic.chosen_interface", lambda *_: public)
    listeners = []
    starts = threading.Timer(1.0, lambda: listeners.append(socket.create_server(("127.0.0.1", free_port))))
    starts.start()
    # It goes on to what comes behind: listening in public is refused.
    with pytest.raises(ExchangeError, match="would listen on wan"):
        ElasticTransport(ElasticSettings(lighthouse=f"127.0.0.1:{free_port}", name="a"))
    starts.join()
    listeners[0].close()


def test_without_a_secret_no_public_address_is_listened_on(monkeypatch):
    public = Interface(name="wan", address="203.0.113.7")
    monkeypatch.setattr("muonwire.transport.elastic.chosen_interface", lambda *_: public)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        how = ElasticSettings(lighthouse=f"127.0.0.1:{listener.getsockname()[1]}", name="a")
        with pytest.raises(
            ExchangeError, match=r"would listen on wan .203.0.113.7., where the internet may reach it"
        ):
            ElasticTransport(how)


def test_without_torchft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchft", None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        how = ElasticSettings(lighthouse=f"127.0.0.1:{listener.getsockname()[1]}", name="a")
        with pytest.raises(UsageError, match=r"pip install 'muonwire\[elastic\]'"):
            ElasticTransport(how)


def test_a_replica_whose_address_changed_leaves(monkeypatch, free_port):
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind=f"127.0.0.1:{free_port}", min_replicas=1)
    transport = ElasticTransport(ElasticSettings(lighthouse=f"127.0.0.1:{free_port}", name="a"))
    try:
        transport._check_address()
        moved = Interface(name="wan", address="10.0.0.9")
        monkeypatch.setattr("muonwire.transport.elastic.interface_to", lambda *_: moved)
        with pytest.raises(ExchangeError, match=r"a came as lo .127.0.0.1., and is now wan .10.0.0.9."):
            transport._check_address()
    finally:
        transport.close()
        server.shutdown()
