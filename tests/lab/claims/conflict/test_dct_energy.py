"""The photograph that polar factors are held against."""

import importlib.util

import pytest

from muonwire.errors import UsageError
from muonwire.lab.claims.conflict import dct_energy


def test_without_a_photograph_the_error_says_what_to_install(monkeypatch):
    assert dct_energy.photograph().ndim == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        dct_energy.photograph()
