"""What of a state is shared: every recipe's claim against what replicas really hold, and a replica that begins anew with it."""

import copy

import pytest
import torch

from muonwire import optim, recipes, stages
from muonwire.errors import UsageError
from muonwire.optim.fresh import fresh_state
from muonwire.optim.sharing import load_shared, own_entries, shared_part
from muonwire.transport import check_replicas
from tests.lockstep import lockstep
from tests.models import RECIPE_OPTIONS, VARIANTS, SmallNet, train

CASES = [(name, RECIPE_OPTIONS.get(name, {})) for name in recipes.RECIPES] + VARIANTS
every_recipe = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[recipes.format_recipe(*case) for case in CASES]
)
STEPS = 4


def leaves(tree, path=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@every_recipe
def test_the_shared_part_is_the_same_on_all_replicas_and_what_is_own_differs(name, options):
    def replica(transport):
        model = SmallNet()
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
        train(model, optimizer, STEPS, rank=transport.rank, world_size=2)
        return copy.deepcopy(optimizer.state_dict()["state"]), shared_part(optimizer), own_entries(optimizer)

    (state, shared, own), (other, others, _) = lockstep(replica, 2)
    assert shared["param_groups"] == others["param_groups"]
    shared_leaves, others_leaves = dict(leaves(shared["state"])), dict(leaves(others["state"]))
    assert shared_leaves.keys() == others_leaves.keys()
    for path, value in shared_leaves.items():
        assert same(value, others_leaves[path]), path
    other_leaves = dict(leaves(other))
    for path, value in leaves(state):
        entry = path.partition(".")[2]
        claimed_own = path not in shared_leaves
        assert claimed_own or entry not in own, path
        # Counts of steps, and the state of a stage that one replica computes for all, may be equal and yet the replica's own.
        if claimed_own and isinstance(value, torch.Tensor) and entry != "master" and value.count_nonzero():
            # What an owner keeps is of its part, and the other owns other parts: perhaps none of this tensor.
            assert entry.endswith("owner.residual") or path in other_leaves, path
            assert path not in other_leaves or not same(value, other_leaves[path]), path


@every_recipe
def test_a_replica_that_lost_its_state_goes_on_with_the_shared_part_of_another(name, options):
    def replica(transport):
        model = SmallNet()
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
        train(model, optimizer, STEPS, rank=transport.rank, world_size=2)
        with optimizer.shared_weights():
            weights = copy.deepcopy(model.state_dict())
        if transport.rank == 0:
            lent.update(shared=copy.deepcopy(shared_part(optimizer)), weights=weights)
        transport.gather(b"", purpose="control")
        if transport.rank == 1:
            model = SmallNet(seed=5)
            model.load_state_dict(lent["weights"])
            optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
            load_shared(optimizer, lent["shared"])
            assert optimizer.num_steps == STEPS
            assert same(model.up.weight, lent["weights"]["up.weight"])
            fresh = fresh_state(optimizer, model.up.weight, optimizer.chains[0], "matrix")
            residual = optimizer.state[model.up.weight].get("exchange", {}).get("residual")
            assert residual is None or not residual.any() or "exchange" not in fresh
        else:
            # As after a restart.
            state = copy.deepcopy(optimizer.state_dict())
            model.zero_grad()
            optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
            optimizer.load_state_dict(state)
        train(model, optimizer, 4, start=STEPS, rank=transport.rank, world_size=2)
        optimizer.synchronize()
        return check_replicas(optimizer.shared(), transport)

    lent = {}
    assert len(set(lockstep(replica, 2))) == 1


def test_what_of_local_steps_is_own():
    model = SmallNet()
    optimizer = recipes.build("one_bit_muon", model, lr=0.01, interval=3)
    own = own_entries(optimizer)
    assert {"momentum.buffer", "outer.exchange.residual", "adam.mean"} <= set(own)
    shared = shared_part(optimizer)["state"][0]
    assert set(shared) == {"shared", "outer"}
    assert set(shared["outer"]) == {"momentum"}


def test_a_talking_stage_of_ones_own_that_does_not_say_what_it_shares_is_named():
    class Gossip(stages.base.TalkingStage):
        def init(self, param):
            return {"heard": torch.zeros_like(param)}

        def __str__(self):
            return "gossip"

    optimizer = optim.ChainOptimizer([torch.nn.Parameter(torch.eye(2))], chain=Gossip(), lr=0.1)
    with pytest.raises(UsageError, match="gossip: the stage keeps heard and does not say"):
        shared_part(optimizer)
