"""The ill-conditioned matrix that methods are timed on."""

import pytest
import torch

from muonwire.lab.measures.orthogonalizing import conditioned


def test_the_made_matrix_has_the_condition():
    values = torch.linalg.svdvals(conditioned(12, 1e5, torch.Generator().manual_seed(0)))
    assert float(values[0]) == pytest.approx(1.0)
    assert float(values[0] / values[-1]) == pytest.approx(1e5, rel=1e-6)
    ratios = values[:-1] / values[1:]
    assert float(ratios.max() / ratios.min()) == pytest.approx(1.0, rel=1e-6)
