"""The file of the toy claim."""

import pytest

from tests.lab.engine.toy import TOY


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path
