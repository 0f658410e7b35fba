"""The bytes of a plan are those that kept runs measured."""

import json
from pathlib import Path

import pytest
import torch

from muonwire import codec, recipes
from muonwire.errors import UsageError
from muonwire.optim.settings import LocalSteps
from muonwire.plan.exchanges import exchanged, synchronizations, way_of
from muonwire.plan.model import read_model
from muonwire.plan.planner import CANDIDATES
from muonwire.stages import Exchange

EVIDENCE = Path(__file__).parents[2] / "evidence"
MEASURED = [
    (file, entry)
    for file in ("frontier.json", "robustness/replicas2.json", "robustness/replicas8.json")
    for entry in json.loads((EVIDENCE / file).read_text())
    if entry["seed"] == 0 and entry["recipe"].split("(")[0] in {c.recipe for c in CANDIDATES}
]


@pytest.mark.parametrize(
    "entry", [e for _, e in MEASURED], ids=[f"{file} {e['recipe']}" for file, e in MEASURED]
)
def test_bytes_and_messages_are_those_of_a_run(entry):
    what = exchanged(entry["recipe"], read_model("pico").module)
    count = what.synchronizations(entry["steps"])
    traffic = what.traffic(entry["replicas"])
    # Digests, and the first message of a kind whose length is told apart, are not planned.
    assert count * traffic.egress_bytes == pytest.approx(
        entry["bytes_egress_per_step"] * entry["steps"], rel=0.02
    )
    assert count * traffic.received_bytes == pytest.approx(
        entry["bytes_received_per_step"] * entry["steps"], rel=0.02
    )
    extra = round(entry["messages_per_step"] * entry["steps"]) - count * traffic.num_messages
    assert 0 <= extra <= 20


@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if not c.growing], ids=lambda c: c.recipe)
def test_payloads_are_what_the_optimizer_says(candidate):
    recipe = candidate.at(5.0, steps=100)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 8, bias=False))
    name, options = recipes.parse_recipe(recipe)
    optimizer = recipes.build(name, model, lr=0.01, **options)
    what = exchanged(recipe, model.to("meta"))
    sent = sum(talk.sent_bytes(4) for talk in what.talks)
    interval = 1 if what.local is None else what.local.interval
    assert sent == pytest.approx(interval * optimizer.estimate_bytes(replicas=4))


@pytest.mark.parametrize(
    "local",
    [None, *(LocalSteps(interval=h, growth=g) for h in (1, 4, 11) for g in (0.0, 0.045, 0.5, 2.0))],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 10, 100, 257])
def test_synchronizations_are_counted_as_they_are_due(local, steps):
    count = alone = 0
    for step in range(1, steps + 1):
        alone += 1
        if local is None or local.due(local_step=step, alone=alone) or step == steps:
            count, alone = count + 1, 0
    assert synchronizations(local, steps) == count


@pytest.mark.parametrize("recipe", ["dion", "powersgd_muon", "approach_b(server=True)"])
def test_a_stage_that_is_not_known_is_an_error(recipe):
    with pytest.raises(UsageError, match="plan knows recipes of mean and exchange"):
        exchanged(recipe, read_model("pico").module)


@pytest.mark.parametrize(("means", "known"), [("gather", True), ("lossless", False)])
def test_an_exchange_that_travels_otherwise_is_an_error_until_its_bytes_are_known(means, known):
    stage = Exchange(codec=codec.parse("sign(scale=tensor)"))
    object.__setattr__(stage, "means", means)
    if known:
        assert way_of(stage) == "gather"
        return
    with pytest.raises(UsageError, match="travel as gather or mean"):
        way_of(stage)


@pytest.mark.parametrize("interval", ["'auto'", "[(0, 3), (9, 4)]"])
def test_an_interval_that_changes_in_the_run_is_not_planned(interval):
    with pytest.raises(
        UsageError, match=r"changes its interval while the run goes.*give interval=NUMBER, or leave it out"
    ):
        exchanged(f"one_bit_muon(interval={interval})", read_model("pico").module)
