"""Every recipe is a torch.optim.Optimizer in full: each part of the contract against the undisturbed run."""

import ast
import copy
import io
import math
import pickle
from functools import cache
from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from muonwire import recipes
from muonwire.errors import NonFiniteUpdateError, UsageError
from muonwire.optim import ChainOptimizer
from tests.models import RECIPE_OPTIONS, VARIANTS, SmallNet, batch, goes_its_own_way, loss, train, weights
from tests.slow import slow_unless

CASES = [(name, RECIPE_OPTIONS.get(name, {})) for name in recipes.RECIPES] + VARIANTS
every_recipe = pytest.mark.parametrize(
    ("name", "options"),
    slow_unless(goes_its_own_way, CASES, ids=lambda *case: recipes.format_recipe(*case)),
)
# Steps before and after something happens: past a synchronization, and within an interval.
BEFORE, AFTER = 4, 4


def built(name, options, model, **more):
    return recipes.build(name, model, lr=0.01, **options, **more)


def trained(name, options, **more):
    model = SmallNet()
    optimizer = built(name, options, model, **more)
    train(model, optimizer, BEFORE)
    return model, optimizer


@cache
def _trained(name, options, nonfinite):
    return trained(name, ast.literal_eval(options), nonfinite=nonfinite)


def trained_copy(name, options, nonfinite="raise"):
    """What ``trained`` returns; the steps are taken once, and test_copies_and_pickles_go_on_alike holds copies to be as good."""
    return copy.deepcopy(_trained(name, repr(options), nonfinite))


@cache
def undisturbed(name, options):
    """The losses after ``BEFORE``, and the weights at the end, of a run with these options, as Python writes them."""
    model, optimizer = trained(name, ast.literal_eval(options))
    return train(model, optimizer, AFTER, start=BEFORE), weights(model)


def assert_goes_on_undisturbed(model, optimizer, name, options):
    losses, ends = undisturbed(name, repr(options))
    assert train(model, optimizer, AFTER, start=BEFORE) == losses
    assert all(torch.equal(p, ends[n]) for n, p in model.named_parameters())


def leaves(tree, path=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def assert_same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@every_recipe
def test_one_type_with_torchs_state_shape(name, options):
    model, optimizer = trained(name, options)
    assert type(optimizer) is ChainOptimizer
    params = [p for p in model.parameters() if p.requires_grad]
    assert set(optimizer.state) == set(params)
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(params)
    assert set(optimizer.defaults) == {"lr", "weight_decay"}

    for state in optimizer.state.values():
        for _, value in leaves(state):
            assert isinstance(value, torch.Tensor | int | float)
            assert (
                not isinstance(value, torch.Tensor)
                or value.element_size() >= 4
                or not value.is_floating_point()
            )
    optimizer.synchronize()
    assert optimizer.estimate_bytes(replicas=1) == 0.0
    with optimizer.shared_weights():
        pass


@every_recipe
def test_copies_and_pickles_go_on_alike(name, options):
    model, optimizer = trained(name, options)
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    pickled, pickled_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    assert_goes_on_undisturbed(model, optimizer, name, options)
    assert_goes_on_undisturbed(copied, copied_optimizer, name, options)
    assert_goes_on_undisturbed(pickled, pickled_optimizer, name, options)


# The options are independent.
@every_recipe
@pytest.mark.parametrize(
    ("flat", "weights_first"),
    slow_unless(lambda _, flat, weights_first: flat == weights_first, product([False, True], repeat=2)),
)
def test_distributed_checkpoints_go_on_alike(name, options, flat, weights_first):
    model, optimizer = trained_copy(name, options)
    chosen = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=chosen))
    resumed = SmallNet(seed=3)
    if weights_first:
        resumed.load_state_dict(model.state_dict())
    second = built(name, options, resumed)
    set_optimizer_state_dict(resumed, second, state, options=chosen)
    resumed.load_state_dict(model.state_dict())
    assert_goes_on_undisturbed(resumed, second, name, options)


@every_recipe
def test_saved_states_load_as_plain_data_and_their_hooks_are_honoured(name, options):
    _, optimizer = trained_copy(name, options)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert seen == ["pre"]
    assert saved.pop("mine") == 1

    def zeroed(tree):
        return {
            k: zeroed(v) if isinstance(v, dict) else torch.zeros_like(v) if isinstance(v, torch.Tensor) else v
            for k, v in tree.items()
        }

    by_hand = {**saved, "state": {k: zeroed(v) for k, v in saved["state"].items()}}
    hooked, plain = SmallNet(), SmallNet()
    second, third = built(name, options, hooked), built(name, options, plain)
    second.register_load_state_dict_pre_hook(
        lambda o, d: {**d, "state": {k: zeroed(v) for k, v in d["state"].items()}}
    )
    second.register_load_state_dict_post_hook(lambda o: seen.append(o.num_steps))
    second.load_state_dict(saved)
    third.load_state_dict(by_hand)
    assert seen[1:] == [BEFORE]
    for p, q in zip(hooked.parameters(), plain.parameters(), strict=True):
        assert str(second.state[p]) == str(third.state[q])


@every_recipe
def test_step_hooks_closures_and_schedulers(name, options):
    model, expected = SmallNet(), SmallNet()
    optimizer, plain = built(name, options, model), built(name, options, expected)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (optimizer, plain)
    ]
    for step in range(BEFORE):

        def closure(step=step):
            optimizer.zero_grad()
            value = loss(model, batch(step))
            value.backward()
            return value

        returned = optimizer.step(closure)
        (wanted,) = train(expected, plain, 1, start=step)
        assert float(returned) == wanted
        for scheduler in schedulers:
            scheduler.step()
    assert calls == ["pre", "post"] * BEFORE
    ratios = {g["lr"] / g["initial_lr"] for g in optimizer.param_groups}
    assert ratios == {1 / (1 + BEFORE)}
    assert_same(model, expected)


@every_recipe
def test_a_group_can_be_added(name, options):
    _, optimizer = trained_copy(name, options)
    added = nn.Parameter(torch.ones(4, 3))
    group = {"params": [added], "names": ["added"], "chain": optimizer.chains[-1]}
    if optimizer.local:
        group["outer_chain"] = next(iter(optimizer.outer.values()))
    if name in ("dion", "muonfast") and optimizer.chains[-1].orthogonalizes:
        group["layouts"] = ["matrix"]
    optimizer.add_param_group(group)
    for _ in range(12):
        added.grad = torch.full((4, 3), 0.5)
        optimizer.step()
    assert not torch.equal(added, torch.ones(4, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)


class Pair(nn.Module):
    """Two layers of one shape, in either order."""

    def __init__(self, order, width=8, up="up"):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        made = {n: torch.randn(width, 8, generator=generator) for n in ("a", up, "z")}
        for n in order:
            setattr(self, n, nn.Linear(8, width, bias=False))
            getattr(self, n).weight.data.copy_(made[n])


def step_pair(model, optimizer, step):
    for i, n in enumerate(sorted(dict(model.named_parameters()))):
        p = dict(model.named_parameters())[n]
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
    optimizer.step()
    optimizer.zero_grad()


@every_recipe
def test_states_know_whose_they_are(name, options):
    first = Pair(["a", "up"])
    optimizer = built(name, options, first)
    for step in range(BEFORE):
        step_pair(first, optimizer, step)
    saved = copy.deepcopy(optimizer.state_dict())

    swapped = Pair(["up", "a"])
    swapped.load_state_dict(first.state_dict())
    second = built(name, options, swapped)
    second.load_state_dict(saved)
    for step in range(BEFORE, BEFORE + AFTER):
        step_pair(first, optimizer, step)
        step_pair(swapped, second, step)
    assert all(
        torch.allclose(p, dict(swapped.named_parameters())[n], atol=1e-6) for n, p in first.named_parameters()
    )

    wide = built(name, options, Pair(["a", "up"], width=12))
    before = str(wide.state_dict())
    with pytest.raises(UsageError, match=r"(a|up)\.weight has shape \(12, 8\)"):
        wide.load_state_dict(saved)
    assert str(wide.state_dict()) == before
    with pytest.raises(UsageError, match=r"z\.weight|a\.weight"):
        built(name, options, Pair(["up", "z"])).load_state_dict(saved)
    with pytest.raises(UsageError, match="has the keys state and param_groups"):
        wide.load_state_dict({"inner": {}})
    other = "sgd" if name != "sgd" else "adamw"
    with pytest.raises(UsageError, match=r"belongs to the chain|parameter groups"):
        built(other, {}, Pair(["a", "up"])).load_state_dict(saved)


@pytest.mark.parametrize(
    ("dtype", "name", "options"),
    # What is done for a dtype is done by the optimizer, whatever its recipe: the others than bfloat16 with every fourth.
    slow_unless(
        lambda index, dtype, *case: (
            (dtype == torch.bfloat16 or index % 4 == 0) and goes_its_own_way(index, *case)
        ),
        [(dtype, *case) for dtype in (torch.bfloat16, torch.float16, torch.float64) for case in CASES],
        ids=lambda dtype, *case: f"{dtype}-{recipes.format_recipe(*case)}",
    ),
)
def test_weights_of_every_dtype_train_and_can_be_cast_at_any_time(name, options, dtype):
    """Built so, cast after the build, and cast in the middle; states stay wide, and a checkpoint of another dtype loads."""
    start = SmallNet().to(dtype)
    models = []
    for when in ("before", "after", "middle"):
        model = copy.deepcopy(start) if when == "before" else SmallNet()
        optimizer = built(name, options, model)
        if when == "after":
            model.to(dtype)
        losses = train(model, optimizer, BEFORE)
        if when == "middle":
            model.to(dtype)
        losses += train(model, optimizer, AFTER, start=BEFORE)
        assert all(map(math.isfinite, losses))
        wide = torch.promote_types(dtype, torch.float32)
        for state in optimizer.state.values():
            assert ("master" in state) == (dtype.itemsize < 4 and not optimizer.look_ahead)
            assert state.get("master", state.get("shared", torch.zeros((), dtype=wide))).dtype == wide
        models.append((model, optimizer, losses))
    (built_so, first, losses), (cast, _, cast_losses), _ = models
    if dtype != torch.float64 and not first.local and not first.look_ahead:
        # Masters begin as the rounded weights either way; shared weights know what they were before.
        assert cast_losses == losses
        assert_same(built_so, cast)
    again = SmallNet()
    again.load_state_dict(built_so.state_dict())
    other = built(name, options, again)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(built_so.parameters(), again.parameters(), strict=True):
        loaded = dict(leaves(other.state[q]))
        for path, value in leaves(first.state[p]):
            if path != "master" and isinstance(value, torch.Tensor) and value.is_floating_point():
                assert torch.equal(value.float(), loaded[path]) or path == "held", path
    back = copy.deepcopy(start)
    other_back = built(name, options, back)
    other_back.load_state_dict(copy.deepcopy(other.state_dict()))
    for losses in (train(again, other, AFTER), train(back, other_back, AFTER)):
        assert all(map(math.isfinite, losses))


@every_recipe
def test_weights_loaded_after_the_build_are_those_that_are_trained(name, options):
    late = SmallNet(seed=7)
    optimizer = built(name, options, late)
    late.load_state_dict(SmallNet().state_dict())
    train(late, optimizer, BEFORE)
    assert_goes_on_undisturbed(late, optimizer, name, options)


@every_recipe
@pytest.mark.parametrize("through", ["load_state_dict", "data"])
def test_weights_edited_in_the_middle_are_those_that_are_trained(name, options, through):
    """After the edit the shared weights are the edited ones, and the next steps stay near them."""
    model, optimizer = trained_copy(name, options)
    before, edited = copy.deepcopy(model), SmallNet(seed=9)
    if through == "data":
        for p, q in zip(model.parameters(), edited.parameters(), strict=True):
            p.data.copy_(q.data)
    else:
        model.load_state_dict(edited.state_dict())
    train(model, optimizer, AFTER, start=BEFORE)
    with optimizer.shared_weights():
        for p, q, old in zip(model.parameters(), edited.parameters(), before.parameters(), strict=True):
            # Norms and biases begin alike with every seed, and are the trained ones before.
            assert (p - q).norm() < (p - old).norm() or q.ndim < 2


@every_recipe
def test_weights_put_away_and_back_are_no_edit(name, options):
    """As evaluation with averaged weights does."""
    model, optimizer = trained_copy(name, options)
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict(SmallNet(seed=4).state_dict())
    model.load_state_dict(own)
    assert_goes_on_undisturbed(model, optimizer, name, options)


def spoil(model, value):
    model.down.weight.grad[0, 0] = value


# What is found does not depend on what is done about it.
@every_recipe
@pytest.mark.parametrize(
    ("value", "skip"),
    slow_unless(
        lambda _, *case: case in ((float("inf"), False), (1e30, True)),
        product([float("nan"), float("inf"), 1e30], [False, True]),
    ),
)
def test_what_is_not_finite_changes_nothing(name, options, value, skip):
    model, optimizer = trained_copy(name, options, "skip" if skip else "raise")
    before = copy.deepcopy(optimizer.state_dict()["state"]), weights(model)
    optimizer.zero_grad()
    loss(model, batch(99)).backward()
    spoil(model, value)
    if skip:
        optimizer.step()
    else:
        with pytest.raises(
            NonFiniteUpdateError, match=r"gradient of down\.weight is not finite|norm is above"
        ):
            optimizer.step()
    assert optimizer.skipped_steps == int(skip)
    if skip and optimizer.local:
        # A step that a replica leaves out still counts towards its interval, and the others may be waiting.
        assert optimizer.num_steps == BEFORE + 1
        assert all(torch.isfinite(p).all() for p in model.parameters())
        return
    kept = dict(leaves(before[0]))
    for path, value in leaves(optimizer.state_dict()["state"]):
        old = kept.pop(path)
        assert torch.equal(value, old) if isinstance(value, torch.Tensor) else value == old, path
    assert not kept
    assert all(torch.equal(p, before[1][n]) for n, p in model.named_parameters())
    assert_goes_on_undisturbed(model, optimizer, name, options)


@every_recipe
def test_a_grad_scaler_skips_what_overflowed_and_nothing_else(name, options):
    """The scale is a power of two, so that scaled runs are the unscaled one to the last bit."""
    model = SmallNet()
    optimizer = built(name, options, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    kept = []
    for step in range(6):
        optimizer.zero_grad()
        value = loss(model, batch(step))
        scaler.scale(value * float("inf") if step == 2 else value).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            kept.append(step)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 2.0**9
    plain = SmallNet()
    expected = built(name, options, plain)
    if not expected.local:
        for step in kept:
            train(plain, expected, 1, start=step)
        assert_same(model, plain)


@pytest.mark.parametrize("name", ["muon", "one_bit_muon"])
def test_meta_parameters_are_refused_with_the_remedy(name):
    with torch.device("meta"):
        model = SmallNet()
    with pytest.raises(UsageError, match=r"is on the meta device.*to_empty"):
        recipes.build(name, model, lr=0.01)


def test_masters_are_shown_and_can_be_left_out():
    kept = recipes.build("muon", SmallNet().bfloat16(), lr=0.01)
    bare = recipes.build("muon", SmallNet().bfloat16(), lr=0.01, masters=False)
    assert "16-bit weights: 6 tensors, 348 parameters with float32 masters" in str(kept)
    assert "348 parameters without float32 masters" in str(bare)
    assert "16-bit" not in str(recipes.build("muon", SmallNet(), lr=0.01))


def test_16_bit_weights_train_without_masters():
    for name in recipes.RECIPES:
        if name == "psyche":
            # Masters have no effect there, and the option is refused.
            continue
        model = SmallNet().bfloat16()
        optimizer = built(name, RECIPE_OPTIONS.get(name, {}), model, masters=False)
        train(model, optimizer, 2)
        assert not all(map(torch.equal, model.parameters(), SmallNet().bfloat16().parameters())), name


def test_masters_keep_updates_that_16_bits_lose():
    moved = []
    for masters in (True, False):
        model = nn.Linear(8, 8, bias=False).bfloat16()
        model.weight.data.fill_(1.0)
        optimizer = recipes.build("sgd", model, lr=1e-3, momentum=0.0, masters=masters)
        for _ in range(8):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        moved.append(float(1 - model.weight[0, 0]))
    assert moved == [0.0078125, 0.0]
