"""The bytes of a plan are those that kept runs measured."""

import json
from pathlib import Path

import pytest
import torch

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.optim.agreement import Handshake
from muonwire.optim.settings import LocalSteps
from muonwire.plan.candidates import CANDIDATES
from muonwire.plan.exchanges import exchanged, synchronizations
from muonwire.plan.model import read_model
from muonwire.transport import run_threads
from muonwire.transport.header import HEADER
from muonwire.transport.meter import Traffic

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
    # The kept runs with local steps are older than the handshake before their exchanges.
    handshakes = what.local is not None
    frames = (entry["replicas"] - 1) * (Handshake.estimate_bytes(0) + HEADER.size) * handshakes
    # Digests, and the first message of a kind whose length is told apart, are not planned.
    assert count * (traffic.up_bytes - frames) == pytest.approx(
        entry["bytes_egress_per_step"] * entry["steps"], rel=0.02
    )
    assert count * (traffic.down_bytes - frames) == pytest.approx(
        entry["bytes_received_per_step"] * entry["steps"], rel=0.02
    )
    extra = round(entry["messages_per_step"] * entry["steps"]) - count * (traffic.num_messages - handshakes)
    assert 0 <= extra <= 20


SHARED = "sign(scale=shared)"
LOSSLESS = f"means='lossless', codec='{SHARED}', vector_codec='{SHARED}'"
# By recipe: by what share there may be more or fewer bytes than planned, and by how many messages. Signs that agree more than by
# chance have sums of other lengths than independent ones; the positions of entries take other bytes in each round.
METERED = {
    "one_bit_muon(interval=2)": (0.006, 0),
    f"one_bit_muon(interval=2, {LOSSLESS})": (0.15, 1),
    "one_bit_muon(interval=2, means='recompressed')": (0.006, 0),
    "one_bit_muon(interval=2, means='auto', parts=2, lengthen=True)": (0.006, 1),
    "sparseloco(interval=2, means='recompressed')": (0.01, 2),
    "muloco(interval=4, fragments=4)": (0.006, 0),
    "one_bit_muon(interval=4, fragments=2, means='recompressed')": (0.006, 0),
    "ef14_muon(means='recompressed', codec='sign(scale=tensor)')": (0.006, 0),
    "muon": (0.0, 0),
}


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("recipe", METERED)
def test_a_synchronization_sends_what_is_planned(recipe, replicas):
    """Its second one, since lengths travel ahead in the first; of the replica that sends, or receives, most."""

    def model_of():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(256, 192), torch.nn.BatchNorm1d(192), torch.nn.Linear(192, 256, bias=False)
        )

    # Parts are so large that their lengths differ by little, and travel in one message.
    what = exchanged(recipe, model_of().to("meta"))
    every = 1 if what.local is None else what.local.interval
    more_bytes, other_messages = METERED[recipe]

    def train(rank, make):
        transport, model = make(), model_of()
        name, options = recipes.parse_recipe(recipe)
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
        counted = []
        for step in range(1, 3 * every + 1):
            inputs = torch.randn(8, 256, generator=torch.Generator().manual_seed(10 * step + rank))
            optimizer.zero_grad()
            model(inputs).pow(2).mean().backward()
            optimizer.step()
            by_purpose = transport.meter.by_purpose
            counted.append(sum((by_purpose.get(p, Traffic()) for p in ("update", "agreement")), Traffic()))
        return counted[-1] - counted[-1 - every]

    metered = run_threads(train, replicas=replicas)
    planned = [what.traffic(replicas, [fragment]) for fragment in what.fragments]
    for way, of_meter in (("up_bytes", "egress_bytes"), ("down_bytes", "received_bytes")):
        most = max(getattr(traffic, of_meter) for traffic in metered)
        ratio = most / sum(getattr(traffic, way) for traffic in planned)
        assert -max(0.01, more_bytes) <= ratio - 1 <= more_bytes + 1e-9
    messages = [traffic.num_messages - sum(t.num_messages for t in planned) for traffic in metered]
    assert max(map(abs, messages)) <= other_messages


@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if not c.growing], ids=lambda c: c.recipe)
def test_payloads_are_what_the_optimizer_says(candidate):
    recipe = candidate.at(5.0, steps=100)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 8, bias=False))
    name, options = recipes.parse_recipe(recipe)
    optimizer = recipes.build(name, model, lr=0.01, **options)
    what = exchanged(recipe, model.to("meta"))
    asked = [asked for together in what.rounds(4, [0]) for asked in together]
    sent = sum(a.own_bytes(rank) for a in asked for rank in range(4)) / 4
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


@pytest.mark.parametrize("growth", [0.0, 0.1])
@pytest.mark.parametrize(("interval", "fragments"), [(4, 1), (6, 4), (11, 3)])
@pytest.mark.parametrize("steps", [3, 22, 47])
def test_fragments_are_sent_as_often_as_they_are_due(interval, fragments, growth, steps):
    recipe = f"one_bit_muon(interval={interval}, fragments={fragments}, growth={growth})"
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(5)))
    name, options = recipes.parse_recipe(recipe)
    counts, left = exchanged(recipe, model).sends(steps)

    def train(rank, make):
        # Threads share the model's shapes and no more.
        own = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(5)))
        own.load_state_dict(model.state_dict())
        optimizer = recipes.build(name, own, lr=0.01, transport=make(), **options)
        for _ in range(steps):
            for p in own.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        return optimizer.param_groups[0], optimizer.param_groups[0]["synchronizations"]

    (group, synchronized), _ = run_threads(train, replicas=2)
    if fragments == 1:
        assert counts == [synchronized]
        assert left == ([0] if group["synchronized_step"] < steps else [])
        return
    assert counts == group["fragments"]["rounds"]
    assert left == [f for f, sent in enumerate(group["fragments"]["sent"]) if sent < steps]


def test_a_fragment_carries_its_own_tensors_and_all_together_carry_all():
    what = exchanged("one_bit_muon(interval=8, fragments=4)", read_model("pico").module)
    of_each = [{id(p) for p in what.params_of([f])} for f in what.fragments]
    assert all(of_each)
    assert sum(map(len, of_each)) == len(set().union(*of_each)) == len(what.params)
    at_once = exchanged("one_bit_muon(interval=8)", read_model("pico").module).traffic(4)
    apart = [what.traffic(4, [f]) for f in what.fragments]
    assert max(t.up_bytes for t in apart) < 0.5 * at_once.up_bytes
    assert sum(t.up_bytes for t in apart) == pytest.approx(at_once.up_bytes, rel=0.03)


def test_merging_on_arrival_takes_one_more_message():
    fixed, arrival = (
        exchanged(f"one_bit_muon(interval=8, fragments=2{more})", read_model("pico").module).traffic(4, [0])
        for more in ("", ", merge='arrival'")
    )
    assert arrival.num_messages == fixed.num_messages + 1


def test_more_fragments_than_tensors_are_an_error():
    with pytest.raises(UsageError, match="fragments is 4, and there are 2"):
        exchanged("one_bit_muon(interval=8, fragments=4)", torch.nn.Sequential(torch.nn.Linear(4, 4)))


@pytest.mark.parametrize("interval", ["'auto'", "[(0, 3), (9, 4)]"])
def test_an_interval_that_changes_in_the_run_is_not_planned(interval):
    with pytest.raises(
        UsageError, match=r"changes its interval while the run goes.*give interval=NUMBER, or leave it out"
    ):
        exchanged(f"one_bit_muon(interval={interval})", read_model("pico").module)
