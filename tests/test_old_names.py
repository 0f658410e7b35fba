"""Names of version 0.1 that still work, with a warning that says what replaces them."""

import importlib
import sys

import pytest

from muonwire import transport


def test_the_old_name_of_transport():
    sys.modules.pop("muonwire.exchange", None)
    with pytest.warns(DeprecationWarning, match=r"muonwire\.exchange is now muonwire\.transport"):
        old = importlib.import_module("muonwire.exchange")
    assert old.Exchange is transport.Transport
    assert old.ProcessGroupExchange is transport.ProcessGroupTransport
    assert old.ThreadExchange is transport.ThreadTransport
    assert all(hasattr(old, name) for name in old.__all__)
