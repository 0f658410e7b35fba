"""The note’s own arithmetic."""

import pytest

from muonwire.lab.claims.vision import update_sizes


def test_the_notes_arithmetic_is_off_by_a_hundred_in_one_example():
    rows = {r["example"]: r for r in update_sizes.arithmetic()}
    assert rows["ViT 64×64, first"]["percent"] == pytest.approx(0.016)
    assert rows["ViT 64×64, first"]["stated over found"] == pytest.approx(100)
    others = [r["stated over found"] for name, r in rows.items() if name != "ViT 64×64, first"]
    assert others == pytest.approx([1, 1, 1], rel=0.03)
