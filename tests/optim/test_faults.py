"""Two replicas, and something that goes wrong on one of them at some step of its training loop.

Whatever it is, it ends in one error of the same class on both replicas, within seconds and without an abort, or in the right
result.
"""

import copy
import os
import time

import pytest
import torch.distributed as dist

from muonwire import recipes
from muonwire.errors import DivergedReplicasError, ExchangeError, NonFiniteUpdateError, ReplicaLostError
from muonwire.transport import ProcessGroupTransport, check_replicas
from tests.models import SmallNet, batch, loss
from tests.replicas import run_replicas
from tests.slow import slow_unless

INTERVAL, STEPS = 3, 8
AT = (0, 1, INTERVAL - 1, INTERVAL, INTERVAL + 1)
RECIPES = {
    "adamw": {},
    "muon": {},
    "distro": {},
    "psyche": {},
    "dion": {},
    "ef21_muon": {},
    "approach_b": {"server": True, "owners": "all"},
    "one_bit_muon": {"interval": INTERVAL},
    "diloco": {"interval": INTERVAL},
    # The first word is the recipe's name.
    "one_bit_muon in fragments": {"interval": INTERVAL, "fragments": 2, "delay": 1},
    "diloco late": {"interval": INTERVAL, "delay": 2},
}
# Faults that are there before the first step.
AT_START = ("another start", "another model", "another recipe", "another dtype")
LOCAL = ("one_bit_muon", "diloco", "one_bit_muon in fragments", "diloco late")
# Of what is sent: the steps, of the first interval and all later ones, and how much later it is merged.
SENDS = {"one_bit_muon in fragments": ((2, 3), 1), "diloco late": ((3,), 2)}
# What they exchange, others do too.
SLOW = ("adamw", "distro", "dion", "ef21_muon", "diloco", "diloco late")
ERRORS = (ExchangeError, DivergedReplicasError, NonFiniteUpdateError, ReplicaLostError)


def _start(fault, rank, name, options):
    """What differs before the first step."""
    odd = rank == 1
    model = SmallNet(seed=5 if odd and fault == "another start" else 0)
    if odd and fault == "another model":
        model = SmallNet(hidden=20)
    if odd and fault == "another dtype":
        model = model.bfloat16()
    if odd and fault == "another recipe":
        name, options = ("sgd", {}) if name != "sgd" else ("adamw", {})
    return model, name, options


def _train(transport, fault, at, name, options):
    """A user's loop; returns the step of each NonFiniteUpdateError, and the digest of the weights."""
    rank = transport.rank
    model, name, options = _start(fault, rank, name, options)
    optimizer = recipes.build(name.split()[0], model, lr=0.01, transport=transport, **options)
    odd, raised = rank == 1, []
    for step in range(STEPS):
        here = step == at and (odd or fault.startswith("both"))
        optimizer.zero_grad()
        if here and fault == "an exception that the loop catches":
            continue
        loss(model, batch(step, rank, 2)).backward()
        if here and fault == "it ends early":
            break
        if here and fault in ("a step left out", "both leave a step out"):
            continue
        if here and fault == "a NaN":
            model.up.weight.grad[1, 2] = float("nan")
        if here and fault == "an infinity":
            model.embed.weight.grad[3, 1] = float("inf")
        if here and fault == "another rate":
            optimizer.param_groups[0]["lr"] *= 2
        if here and fault in ("weights loaded", "both load weights"):
            model.load_state_dict(SmallNet(seed=9).state_dict())
        try:
            optimizer.step()
            if here and fault == "a step twice":
                optimizer.step()
        except NonFiniteUpdateError:
            raised.append(step)
    optimizer.synchronize()
    with optimizer.shared_weights():
        return raised, check_replicas(model.named_parameters(), transport)


def _steps(name, fault):
    """The steps at which it goes wrong; those of a recipe that exchanges in each are alike after the first."""
    return AT[:1] if fault in AT_START else AT if name in LOCAL else AT[:2]


def _all(name, options, faults):
    """Every fault at every step that differs, each with a process group of its own."""
    outcomes = {}
    for fault in faults:
        for at in _steps(name, fault):
            transport = ProcessGroupTransport(dist.new_group())
            began = time.perf_counter()
            try:
                outcome = _train(transport, fault, at, name, copy.deepcopy(options))
            except ERRORS as error:
                outcome = f"{type(error).__name__}: {error}"
            outcomes[fault, at] = outcome, time.perf_counter() - began
    return outcomes


ERROR_ON_BOTH = {
    "a step left out": "ExchangeError: .*replica 0 is in step {0} .*, replica 1 in step {1}",
    "a step twice": "ExchangeError: replicas are out of step",
    "it ends early": "ExchangeError: replicas are out of step",
    "an exception that the loop catches": "ExchangeError: replicas are out of step",
    "another start": "DivergedReplicasError: the replicas do not start from the same weights",
    "another model": "ExchangeError: the optimizer groups of replica",
    "another recipe": "ExchangeError: the optimizer groups of replica",
    "another dtype": "ExchangeError: the optimizer groups of replica",
    "weights loaded": "DivergedReplicasError: ",
}
RIGHT_RESULT = ("a NaN", "an infinity", "both leave a step out", "both load weights")
FAULTS = [*ERROR_ON_BOTH, "another rate", *RIGHT_RESULT]


@pytest.fixture(
    scope="module",
    params=slow_unless(lambda _, name: name not in SLOW, [(name,) for name in RECIPES]),
)
def found(request):
    name = request.param
    return name, run_replicas(_all, 2, name, RECIPES[name], FAULTS)


@pytest.mark.parametrize("fault", ERROR_ON_BOTH)
def test_what_cannot_go_on_is_one_error_on_both(found, fault):
    name, (first, second) = found
    for at in _steps(name, fault):
        (one, seconds), (other, other_seconds) = first[fault, at], second[fault, at]
        assert max(seconds, other_seconds) < 10
        for outcome in (one, other):
            assert isinstance(outcome, str), f"{name}, {fault} at {at}: {outcome}"
            assert outcome.split(":")[0] == ERROR_ON_BOTH[fault].split(":")[0], outcome
        if fault == "a step left out" and name not in LOCAL:
            assert f"replica 0 is in step {at + 1} " in one
            assert f"replica 1 in step {at + 2} " in other


def test_a_rate_of_its_own_is_an_error_where_steps_are_taken_together(found):
    name, (first, second) = found
    for at in _steps(name, "another rate"):
        for outcome, _ in (first["another rate", at], second["another rate", at]):
            if name in LOCAL:
                assert outcome == first["another rate", at][0]
            else:
                assert outcome.startswith("ExchangeError: replicas step with different settings"), outcome


@pytest.mark.parametrize("fault", ["a NaN", "an infinity"])
def test_what_is_not_finite_is_raised_on_both_and_the_loop_goes_on_without_that_batch(found, fault):
    name, (first, second) = found
    for at in _steps(name, fault):
        one, other = first[fault, at][0], second[fault, at][0]
        assert one == other
        raised, digest = one
        if name in SENDS:
            # In the step that merges what is sent next.
            sends, delay = SENDS[name]
            sent = next(s for i in range(STEPS) for s in (n + i * INTERVAL for n in sends) if s > at)
            assert raised == [sent + delay - 1]
        elif name in LOCAL:
            # In the step that synchronizes next.
            assert raised == [at + (INTERVAL - 1 - at) % INTERVAL]
        else:
            assert raised == [at]
            assert digest == first["both leave a step out", at][0][1]


def test_what_all_do_alike_is_no_fault(found):
    name, (first, second) = found
    for fault in ("both leave a step out", "both load weights"):
        for at in _steps(name, fault):
            assert first[fault, at][0] == second[fault, at][0]
            assert first[fault, at][0][0] == []
    assert first["both load weights", 0][0] != first["both leave a step out", 0][0]


def _dies(name, options, at):
    transport = ProcessGroupTransport()
    if transport.rank == 1:
        at_step = iter(range(at))
        own = recipes.build

        def build(*args, **kwargs):
            optimizer = own(*args, **kwargs)
            step = optimizer.step

            def dying(*more):
                if next(at_step, None) is None:
                    os._exit(1)  # as a script whose loss raises
                return step(*more)

            optimizer.step = dying
            return optimizer

        recipes.build = build
    began = time.perf_counter()
    try:
        _train(transport, "none", -1, name, options)
    except ReplicaLostError as error:
        return error.rank, time.perf_counter() - began
    return None


@pytest.mark.parametrize(
    ("name", "at"),
    [
        (name, at)
        for name in ("muon", "distro", "one_bit_muon", "one_bit_muon in fragments")
        for at in _steps(name, "none")
    ],
)
def test_a_replica_that_dies_is_named_to_the_others(name, at):
    lost, seconds = run_replicas(_dies, 2, name, RECIPES[name], at, expect_lost=(1,))[0]
    assert lost == 1
    assert seconds < 10


def main():
    """Every fault at every step on every recipe: python -m tests.optim.test_faults."""
    from tests.recipes.test_conformance import CASES

    count, slowest, odd = 0, 0.0, []
    for name, options in CASES:
        options = {**options, "interval": INTERVAL} if "interval" in options else options
        first, second = run_replicas(_all, 2, name, options, FAULTS)
        for situation, (one, seconds) in first.items():
            other, other_seconds = second[situation]
            kinds = {str(o).split(":")[0] if isinstance(o, str) else o[1] for o in (one, other)}
            count, slowest = count + 1, max(slowest, seconds, other_seconds)
            fault = situation[0]
            ends = isinstance(one, str)
            if len(kinds) > 1 or ((fault in ERROR_ON_BOTH) != ends and fault != "another rate"):
                odd.append((recipes.format_recipe(name, options), *situation, one, other))
        print(f"{recipes.format_recipe(name, options)}: {len(first)} situations", flush=True)
    print(
        f"{count} situations, the slowest {slowest:.1f} s, {len(odd)} neither one error on both nor one result"
    )
    for line in odd:
        print(*line)


if __name__ == "__main__":
    main()
