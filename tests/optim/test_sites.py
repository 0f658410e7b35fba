"""Optimizers whose replicas act as sites, against as many replicas that each see the mean gradient of a site."""

import copy
import os
import pickle

import pytest
import torch
from torch import nn

from muonwire import recipes
from muonwire.errors import (
    DivergedReplicasError,
    ExchangeError,
    NonFiniteUpdateError,
    PayloadError,
    ReplicaLostError,
    UsageError,
)
from muonwire.optim import local_steps
from muonwire.optim.settings import LocalSteps
from muonwire.transport import ProcessGroupTransport, check_replicas, run_threads, site_transport
from tests.models import RECIPE_OPTIONS, VARIANTS, SmallNet, batch, loss, weights
from tests.replicas import run_replicas

SITES, INSIDE, STEPS = 2, 2, 8
SHARED = {"codec": "sign(scale=shared)", "vector_codec": "sign(scale=shared)"}
CASES = [
    *((name, RECIPE_OPTIONS.get(name, {})) for name in recipes.RECIPES),
    *VARIANTS,
    ("local_muon", {"interval": 3, "fragments": 3}),
]
every_recipe = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[recipes.format_recipe(*case) for case in CASES]
)


def gradients(model, step, rank, world_size):
    model.zero_grad()
    loss(model, batch(step, rank, world_size)).backward()
    return [p.grad.clone() for p in model.parameters()]


def update_bytes(transport):
    training = transport.meter.training
    return training.sent_bytes, training.egress_bytes, training.received_bytes, training.num_messages


def by_site(transport, name, options, steps=STEPS, inside=INSIDE):
    """One of the replicas of the sites; its losses are its own."""
    everyone = transport.everyone
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
    for step in range(steps):
        gradients(model, step, everyone.rank, everyone.world_size)
        optimizer.step()
    optimizer.synchronize()
    return weights(model), optimizer.state_dict()["state"], update_bytes(transport), transport.is_leader


def by_hand(transport, name, options, inside=INSIDE):
    """A replica that stands for a site: it averages the gradients of all its batches by itself."""
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
    for step in range(STEPS):
        parts = [
            gradients(model, step, transport.rank * inside + i, transport.world_size * inside)
            for i in range(inside)
        ]
        for p, first, *others in zip(model.parameters(), *parts, strict=True):
            p.grad = first.clone()
            for g in others:
                p.grad += g
            p.grad /= inside
        optimizer.step()
    optimizer.synchronize()
    return weights(model), optimizer.state_dict()["state"], update_bytes(transport)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


@every_recipe
def test_sites_are_replicas_that_see_the_mean_gradient(name, options):
    """To the last bit, in weights and states, and the same bytes cross between sites as between as many replicas."""
    expected = run_threads(lambda _, make: by_hand(make(), name, options), replicas=SITES)
    found = run_threads(
        lambda _, make: by_site(site_transport(make(), sites=SITES), name, options), replicas=SITES * INSIDE
    )
    for rank, (model, states, traffic, leads) in enumerate(found):
        site = rank // INSIDE
        assert_same(model, expected[site][0])
        if options.get("merge") != "arrival":
            assert_same(states, expected[site][1])
        assert leads == (rank % INSIDE == 0)
        assert traffic == (expected[site][2] if leads else (0, 0, 0, 0))
