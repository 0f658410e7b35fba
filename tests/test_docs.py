import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from torch import nn

from muonwire import recipes
from muonwire.recipes.describe import settings_of

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
    for settings in settings_of(recipes.RECIPES[name].options):
        rows = generate.options_table(settings).splitlines()[6:]
        assert len(rows) == len(settings.__annotations__)
        for row in rows:
            option, default, meaning = row.replace("\\|", "").strip("|").split("|")
            assert default.strip() or option.strip() == "`lr`"
            assert len(meaning.strip()) > 3, row


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_a_recipe_is_shown_as_a_call_of_all_its_options(generate, name):
    recipe = recipes.RECIPES[name]
    section = generate.recipe_section(recipe, optimizer="the chain")
    call = section.split("```text\n")[1].split("```")[0]
    shown = {k.arg for k in ast.parse(call).body[0].value.keywords}
    shared = {"transport", "start", "nonfinite", "masters", "exclude_buffers"}
    assert shown | {"weight_decay"} | shared == {f.name for f in fields(recipe.options)}
    assert not shown & shared
    assert "the chain" in section


def test_predictions_that_did_not_hold_are_said(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "PLAN", tmp_path)
    line = {
        "recipe": "muloco(interval=12)",
        "total_s": 100.0,
        "cost": {"low": 0.01, "expected": 0.02, "high": 0.03},
    }
    record = {
        "setting": {"link": "1mbit/20ms", "replicas": 2, "steps": 800},
        "prediction": {"line": line, "model": {"num_parameters": 123_200}},
        "measured": {"steps_s": 150.0},
        "time_ratio": 100 / 150,
        "bytes_ratio": 0.994,
        "time_holds": False,
        "cost": 0.025,
        "loss_holds": True,
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    (tmp_path / "a.prediction.json").write_text(json.dumps(record["prediction"]))
    (tmp_path / "b.json").write_text(json.dumps({key: record[key] for key in list(record)[:-2]}))
    _, _, *rows = generate.plan_table().splitlines()
    cells, timed = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[:5] == ["`muloco(interval=12)`", "1mbit/20ms", "2", "123,200", "800"]
    assert cells[5:] == ["100.0, 150.0: 0.67 (**no**)", "+2.0 % (+1.0 to +3.0)", "+2.5 %", "0.994"]
    # Where no loss was trained yet, the time is there all the same.
    assert timed == [*cells[:7], "not yet", "0.994"]


def test_losses_of_owners_means_are_judged_by_the_spread_of_the_gather(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "OWNERS", tmp_path)
    losses = {
        "gather": (1.40, 1.44, 1.42),
        "lossless": (1.43, 1.46, 1.44),
        "recompressed": (1.46, 1.49, 1.47),
    }
    sizes = {"bytes_egress_per_step": 2000.0, "bytes_received_per_step": 3000.0}
    records = [
        {
            "recipe": f"one_bit_muon({means})",
            "options": {} if means == "gather" else {"means": means},
            "final_eval_loss": loss,
            **sizes,
        }
        for means, of_seeds in losses.items()
        for loss in of_seeds
    ]

    def rows():
        (tmp_path / "loss.json").write_text(json.dumps(records))
        _, _, *lines = generate.owners_loss_table().splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    gather, lossless, recompressed = rows()
    assert gather == ["`one_bit_muon(gather)`", "1.4200", "1.4000 to 1.4400", "", "", "2.00, 3.00"]
    assert lossless[3:5] == ["+0.0233", "yes"]
    assert recompressed[3:5] == ["+0.0533", "**no**"]
    # Of a run that diverged the loss is no number.
    records[-1]["final_eval_loss"] = float("nan")
    assert rows()[2][3:5] == ["+nan", "**no**"]
