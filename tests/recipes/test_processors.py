"""Replicas on processors of different classes: every recipe's shared weights stay bit-identical, also when a run moves."""

import copy
import dataclasses

import pytest
import torch

from muonwire import recipes
from muonwire.polar import PROCESSORS, find_processor, processor, set_processor
from muonwire.transport import ProcessGroupTransport, SingleReplica, check_replicas
from tests.models import RECIPE_OPTIONS, VARIANTS, SmallNet, train
from tests.replicas import run_replicas

CASES = [(name, RECIPE_OPTIONS.get(name, {})) for name in recipes.RECIPES] + VARIANTS
CLASSES = ("amx", "avx2")
SIZES = {"width": 48, "hidden": 64}


def take_for(name):
    """Be a processor of class ``name``; one with fast 16-bit products uses them for these small matrices too."""
    PROCESSORS["amx"] = dataclasses.replace(processor.AMX, smallest_half=1e5)
    set_processor(name)


@pytest.fixture(autouse=True)
def recognized():
    yield
    PROCESSORS["amx"] = processor.AMX
    set_processor(None)


@pytest.mark.parametrize("name", ["muon", "one_bit_muon"])
def test_the_class_changes_the_weights(name):
    """Or the tests below could not fail."""
    found = []
    for name_of_class in CLASSES:
        take_for(name_of_class)
        model = SmallNet(**SIZES)
        train(model, recipes.build(name, model, lr=0.01), 2)
        found.append(model.up.weight.detach().clone())
    assert not torch.equal(*found)


def _train_and_move(cases):
    """For each recipe: digests, losses and classes of an undisturbed run, and of one that goes on with the classes swapped."""
    outcomes = []
    for name, options in cases:
        transport = ProcessGroupTransport()
        rank = transport.rank

        def build(model, name=name, options=options, transport=transport):
            return recipes.build(name, model, lr=0.01, transport=transport, **options)

        take_for(CLASSES[rank])
        model = SmallNet(**SIZES)
        optimizer = build(model)
        train(model, optimizer, 2, rank=rank, world_size=2)
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        ends = []
        for going_on in (False, True):
            if going_on:
                take_for(CLASSES[1 - rank])
                model = SmallNet(**SIZES)
                model.load_state_dict(weights)
                optimizer = build(model)
                optimizer.load_state_dict(state)
            losses = train(model, optimizer, 2, start=2, rank=rank, world_size=2)
            with optimizer.shared_weights():
                digest = check_replicas(model.named_parameters(), transport)
            ends.append(
                (digest, losses, [group.get("processor") for group in optimizer.param_groups], str(optimizer))
            )
        outcomes.append((recipes.format_recipe(name, options), ends))
    return outcomes


def test_replicas_of_two_classes_agree_and_keep_their_dtype_where_the_run_moves():
    by_rank = run_replicas(_train_and_move, 2, CASES)
    for first, second in zip(*by_rank, strict=True):
        name, (whole, _) = first
        assert whole[0] == second[1][0][0], name
        for rank, (_, ends) in enumerate((first, second)):
            assert ends[0] == ends[1], f"{name} on replica {rank}"
        if "local steps" in whole[3]:
            assert set(whole[2]) == {"amx"}, name
            assert set(second[1][0][2]) == {"avx2"}, name
        else:
            assert set(whole[2]) == {"avx2"}, name
    texts = {name: ends[0][3] for name, ends in by_rank[0]}
    assert "polar factors as on avx2 processors: float32" in texts["muon"]
    assert "polar factors as on amx processors: bfloat16" in texts["one_bit_muon(interval=3)"]


def test_mixed_classes_warn_where_replicas_compute_polar_factors_alike():
    warned = run_replicas(_warnings, 2)
    for messages in warned:
        assert len(messages["muon"]) == len(messages["distro"]) == 1
        assert "different classes (amx, avx2 by rank); polar factors follow avx2" in messages["muon"][0]
        assert messages["adamw"] == messages["one_bit_muon"] == []


def _warnings():
    import warnings

    found = {}
    for name in ("muon", "distro", "adamw", "one_bit_muon"):
        transport = ProcessGroupTransport()
        take_for(CLASSES[transport.rank])
        model = SmallNet()
        optimizer = recipes.build(name, model, lr=0.01, transport=transport)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, 2, rank=transport.rank, world_size=2)
        found[name] = [str(w.message) for w in caught if "classes" in str(w.message)]
    return found


def test_a_state_from_before_the_first_step_follows_the_processor_that_it_is_loaded_on():
    take_for("amx")
    state = copy.deepcopy(recipes.build("muon", SmallNet(), lr=0.01, transport=SingleReplica()).state_dict())
    take_for("avx2")
    model = SmallNet()
    optimizer = recipes.build("muon", model, lr=0.01)
    optimizer.load_state_dict(state)
    train(model, optimizer, 1)
    assert optimizer.processor is find_processor(model.up.weight.device)
