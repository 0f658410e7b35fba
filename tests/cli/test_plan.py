"""`muonwire plan`: the table, its JSON, and one clear error for each kind of bad input."""

import json
import re

import pytest

from muonwire.cli import main as cli
from muonwire.plan import CANDIDATES, machine
from muonwire.plan.processor import ProcessorCost

LINK = ("--up", "20mbit", "--down", "200mbit", "--latency", "40ms")
FULL = (*LINK, "--replicas", "8", "--parameters", "2e6", "--step-s", "0.8", "--steps", "2000")


def call(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *args])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_table_names_every_recipe_and_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(capsys, *FULL)
    assert code == 0
    head, _, rest = out.partition("─")
    table = rest[: rest.index("more than the share")]
    assert "8 replicas, 2,000 steps: 2,000,000 parameters" in head
    assert "20 Mbit/s up, 200 down, 40 ms one way" in head
    for candidate in CANDIDATES:
        assert re.search(rf"^{candidate.name}\b", table, re.MULTILINE)
    # The form of many replicas is there from eight on.
    assert "\n parts=4," in table
    # What this machine takes for each exchange does not decide which ones there are.
    monkeypatch.setattr(
        machine, "cost_of", lambda *_, **__: ProcessorCost(per_entry_s=1e-9, per_tensor_s=1e-5)
    )
    _, few, _ = call(capsys, *FULL, "--replicas", "7")
    assert "muloco" in few
    assert "parts=4" not in few
    assert max(map(len, ("─" + table).splitlines())) <= 80
    assert "evidence/frontier.json[3, 4, 5] one_bit_muon" in out
    assert "8 replicas (4 measured): adamw" in out or "8 replicas (4 measured): muon" not in out
    assert "optimizer = muonwire.recipes.one_bit_muon(model, transport=transport, lr=" in out


def test_json_has_all_figures_and_money(capsys):
    code, out, _ = call(
        capsys, *FULL, "--recipes", "muon", "muloco", "muloco(interval=9)", "--price-per-gb", "0.1", "--json"
    )
    assert code == 0
    plan = json.loads(out)
    assert plan["model"]["num_parameters"] == 2_000_000
    assert plan["rates"] == {"up_mbit_s": 20, "down_mbit_s": 200, "latency_s": 0.04, "goodput": False}
    by_recipe = {line["recipe"]: line for line in plan["recipes"]}
    assert len(by_recipe) == 3
    muon, nine = by_recipe["muon"], by_recipe["muloco(interval=9)"]
    # 7 parts of an eighth each, twice, in float32.
    assert muon["up_bytes"] == pytest.approx(2 * 7 * (4 * 2e6 / 8 + 16), rel=1e-6)
    assert muon["total_up_bytes"] == 2000 * muon["up_bytes"]
    assert muon["money"] == pytest.approx(0.1 * 8 * muon["total_up_bytes"] / 1e9)
    assert not muon["fits"]
    assert nine["synchronizations"] == 223
    assert nine["cost"]["low"] < nine["cost"]["expected"] < nine["cost"]["high"]
    assert nine["command"].endswith("interval=9)")


def test_means_and_fragments_that_plan_chooses_stand_in_the_table_and_in_the_command(capsys):
    link = ("--up", "2mbit", "--down", "2mbit", "--latency", "5ms", "--replicas", "16")
    args = (*link, "--parameters", "nano", "--step-s", "0.5", "--steps", "2000")
    code, out, _ = call(capsys, *args, "--recipes", "one_bit_muon(interval='auto', fragments=4, delay=2)")
    assert code == 0
    assert re.search(r"means='recompressed': .*replicas: 16 \(8 measured\)", out)
    assert "evidence/streaming/text.json" in out
    command = out.strip().splitlines()[-1]
    assert re.search(
        r"--recipe 'one_bit_muon\(interval=\d+, fragments=4, delay=2, means='\"'\"'recompressed", command
    )
    # H follows from what the processor takes, which is measured anew.
    code, out, _ = call(capsys, *args, "--recipes", "one_bit_muon(fragments=4, delay=2)", "--json")
    (line,) = json.loads(out)["recipes"]
    assert line["recipe"].endswith("fragments=4, delay=2, means='recompressed')")
    assert 0 < line["hidden_s"] <= line["link_s"]
    assert line["share"] == pytest.approx(line["exchange_s"] / line["total_s"])


def test_a_preset_gets_the_command_that_trains_it(capsys):
    link = ("--up", "1gbit", "--down", "1gbit", "--replicas", "3")
    args = (*link, "--step-s", "0.1", "--steps", "900", "--share", "0.9", "--recipes", "muloco(interval=30)")
    code, out, _ = call(capsys, *args, "--parameters", "micro")
    assert code == 0
    command = out.strip().splitlines()[-1]
    assert command.startswith("torchrun --nnodes 3 --node-rank 0 --master-addr ")
    assert (
        "-m muonwire train --model-size micro --steps 900 --recipe 'muloco(interval=30)' --lr 0.007"
        in command
    )


def test_the_model_of_a_task_is_planned_for_where_none_is_given(capsys):
    args = (*LINK, "--replicas", "2", "--step-s", "0.1", "--recipes", "adamw")
    code, out, _ = call(capsys, *args, "--model-size", "pico", "--batch", "2")
    assert code == 0
    assert "123,200 trainable (122,880 in matrices)" in out
    assert "no recipe keeps exchange below this share" in out


def test_steps_are_measured_on_one_machine(capsys):
    args = (
        "--up",
        "1gbit",
        "--down",
        "1gbit",
        "--replicas",
        "2",
        "--measure",
        "--recipes",
        "adamw",
        "--json",
    )
    code, out, _ = call(capsys, *args, "--model-size", "pico", "--batch", "1", "--sequence", "16")
    assert code == 0
    plan = json.loads(out)
    assert 0 < plan["machine"]["compute_s"] < 10
    assert 0 < plan["machine"]["optimizer_s"]["adam"] < 10
    (line,) = plan["recipes"]
    assert line["step_s"] == plan["machine"]["compute_s"] + plan["machine"]["optimizer_s"]["adam"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--up": None}, "--up of the link is missing"),
        ({"--up": None, "--down": None}, "--up and --down of the link are missing"),
        ({"--up": "0mbit"}, "up is '0mbit'; give a positive rate"),
        ({"--down": "quick"}, "down is 'quick'"),
        ({"--latency": "soon"}, "latency is 'soon'"),
        ({"--replicas": None}, "the number of replicas is not known; give --replicas"),
        ({"--replicas": "0"}, "replicas is 0; at least 2"),
        ({"--step-s": None}, "how long a step takes is not known; give --step-s SECONDS, or --measure"),
        ({"--step-s": "0"}, "step_s is 0.0"),
        ({"--step-s": "nan"}, "step_s is nan"),
        ({"--share": "1.5"}, "share is 1.5; it lies between 0 and 1"),
        ({"--steps": "0"}, "steps is 0"),
        ({"--price-per-gb": "-1"}, "price_per_gb is -1.0"),
        ({"--parameters": "0"}, "parameters is 0"),
        ({"--parameters": "/"}, "a folder without a model's config.json"),
        ({"--recipes": "lion"}, "recipe: 'lion' is unknown"),
        ({"--recipes": "muloco(interval=0)"}, "interval (H) is 0"),
        ({"--recipes": "dion"}, "plan knows recipes of mean and exchange"),
        ({"--recipes": "muon(interval='auto')"}, "interval is 'auto', and muon has none"),
        ({"--recipes": "one_bit_muon(interval=4, delay=4)"}, "delay is 4; with an interval (H) of 4"),
        ({"--recipes": "one_bit_muon(interval=400, fragments=200)"}, "fragments is 200, and there are"),
        ({"--measure": ""}, "--measure times the task's own model; leave --parameters and --step-s out"),
    ],
)
def test_bad_input_is_one_clear_error(capsys, changes, says):
    given = dict(zip(FULL[::2], FULL[1::2], strict=True)) | changes
    args = [word for name, value in given.items() if value is not None for word in (name, value) if word]
    code, _, err = call(capsys, *args)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
