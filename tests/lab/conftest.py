"""The whole lab once, with quick settings."""

import pytest

from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.engine.run import LabConfig, run


@pytest.fixture(scope="session")
def quick_lab(tmp_path_factory):
    """The folder of a quick run of every claim."""
    out = tmp_path_factory.mktemp("lab")
    failures = run(LabConfig(out=out, quick=True), list(load_claims().values()), say=lambda text: None)
    assert not failures
    return out
