"""The note’s rule for the dtype."""

import pytest
import torch

from muonwire.lab.claims.integration import precision_by_device


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("cuda", (6, 1), "float32"),
        ("cuda", (7, 0), "float16"),
        ("cuda", (7, 5), "float16"),
        ("cuda", (8, 0), "bfloat16"),
        ("cuda", (9, 0), "bfloat16"),
    ],
)
def test_the_rule_of_the_source(monkeypatch, device, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_by_device.rule(torch.device(device)) == dtype
