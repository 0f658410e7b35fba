"""The pretrained model whose gradients are measured."""

import pytest

from muonwire.errors import UsageError
from muonwire.lab import LabConfig, choose, load_claims, run
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.language_model import LANGUAGE_MODEL
from tests.spectra.conftest import build_small


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_of_the_language_model_that_is_named(kind, tmp_path):
    place = tmp_path / f"small-{kind}"
    build_small(kind).save_pretrained(place)
    one, out = LANGUAGE_MODEL, tmp_path / "lab"
    folder = one.prepare(out, quick=False, model=str(place))
    found = list(captured(folder, kind="momentum"))
    # Two layers: the first and the last, which is the middle too.
    assert len(found) == 2 * (7 if kind == "llama" else 4)
    assert all(float(c.matrix.norm()) > 0 for c in found)
    assert f"pretrained small-{kind} " in one.described(out, quick=False)
    with pytest.raises(UsageError, match=r"not from smollm2; give the measurements of another model.*--out"):
        one.prepare(out, quick=False)
    with pytest.raises(UsageError, match="not from smollm2"):
        run(LabConfig(ids=("future.1",), out=out), choose(load_claims(()), ("future.1",)))
    assert one.prepare(out, quick=False, model=str(place)) == folder
