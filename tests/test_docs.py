import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from muonwire import recipes

ROOT = Path(__file__).parents[1]


def test_the_generated_documentation_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_bits_are_the_mean_over_the_seeds_of_the_defaults(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "FRONTIER", tmp_path / "frontier.json")
    assert generate.measured_bits() == {}
    bits = (("muon", 32.0), ("local_muon", 0.1), ("local_muon", 0.2), ("local_muon(interval=9)", 5.0))
    entries = [{"recipe": recipe, "bits_per_parameter_step": value} for recipe, value in bits]
    generate.FRONTIER.write_text(json.dumps(entries))
    assert generate.measured_bits()["local_muon"] == pytest.approx(0.15)
    assert generate.measured_bits()["muon"] == 32.0


def test_what_travels_is_found_within_stages_of_stages(generate):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wires = generate.wires_of(recipes.build("approach_f", model, lr=0.01))
    assert wires == ["float32", "dct(chunk=64) | topk(k=32) | sign(scale=chunk)"]
    local = generate.wires_of(recipes.build("local_muon", model, lr=0.01))
    assert local == ["topk(density=0.1) | sign(scale=tensor)", "sign(scale=tensor)"]
    assert generate.wires_of(recipes.build("muon", model, lr=0.01)) == ["mean"]


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_every_option_has_a_default_and_a_meaning(generate, name):
    for settings in generate.settings_of(recipes.RECIPES[name].options):
        for row in generate.options_table(settings).splitlines()[4:]:
            assert len(row.replace("\\|", "").strip("|").split("|")[2].strip()) > 3, row
