"""The ill-conditioned matrix that methods are timed on."""

import pytest
import torch

from muonwire.lab.claims.top_down import cost_of_orthogonalizing


def test_the_made_matrix_has_the_condition():
    values = torch.linalg.svdvals(
        cost_of_orthogonalizing.conditioned(12, 1e5, torch.Generator().manual_seed(0))
    )
    assert float(values[0]) == pytest.approx(1.0)
    assert float(values[0] / values[-1]) == pytest.approx(1e5, rel=1e-6)
    ratios = values[:-1] / values[1:]
    assert float(ratios.max() / ratios.min()) == pytest.approx(1.0, rel=1e-6)
