"""The state that one replica hands to another, over links that are slow or break."""

import http.server
import io
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch

from muonwire.errors import ExchangeError
from muonwire.transport.elastic_parts import StateTransport

STEP = 7


@pytest.fixture
def served():
    """A transport whose replica serves 8 MiB, and where."""
    transport = StateTransport(
        timeout=timedelta(seconds=0.4), longest=timedelta(seconds=20), address="127.0.0.1"
    )
    state = {"state": torch.arange(1 << 21, dtype=torch.int32).view(torch.uint8), "tag": "x"}
    transport.send_checkpoint([1], STEP, state, timedelta(seconds=1))
    yield transport, state
    transport.shutdown()


def fetch(transport, address):
    return transport.recv_checkpoint(0, address, STEP, timedelta(seconds=1))


def test_a_state_may_take_longer_than_a_message(served):
    transport, state = served
    host, port = transport.address().removeprefix("http://").split("/")[0].rsplit(":", 1)
    with socket.socket() as reader:
        # Less than is sent at once fits on the way.
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        reader.connect((host, int(port)))
        reader.sendall(f"GET /checkpoint/{STEP}/full HTTP/1.0\r\n\r\n".encode())
        received, began = io.BytesIO(), time.monotonic()
        # Slow, but never silent, for several times the limit of a message.
        while data := reader.recv(1 << 18):
            received.write(data)
            time.sleep(0.02 if time.monotonic() - began < 1.5 else 0)
    assert state["state"].numpy().tobytes() in received.getvalue()


def test_a_state_is_fetched_whole(served):
    transport, state = served
    assert torch.equal(fetch(transport, transport.address())["state"], state["state"])


@pytest.mark.parametrize("share", [0.9, 0.0])
def test_a_state_that_breaks_off_says_so(served, share):
    transport, _ = served
    whole = io.BytesIO()
    from torchft.checkpointing._serialization import _streaming_save

    _streaming_save({"state": torch.ones(1 << 16), "tag": "x"}, whole)

    class Breaks(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(whole.getvalue()[: int(share * len(whole.getvalue()))])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Breaks)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ExchangeError, match="the state broke off while it was fetched, or is damaged"):
            fetch(transport, f"http://127.0.0.1:{server.server_port}/checkpoint/")
    finally:
        server.shutdown()
        server.server_close()
