"""The contract that every recipe passes."""

import math
from functools import cache

import pytest
import torch

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.transport import ProcessGroupTransport, SingleReplica, check_replicas
from tests.models import RECIPE_OPTIONS, VARIANTS, SmallNet, batch, loss, train, weights
from tests.replicas import run_replicas

# Options under which a recipe compresses nothing, so that it must be its dense counterpart.
UNCOMPRESSED = {
    "local_muon": {"interval": 1, "codec": "topk(density=1) | float32", "vector_codec": "float32"}
}


CASES = [(name, RECIPE_OPTIONS.get(name, {})) for name in recipes.RECIPES] + VARIANTS
IDS = [recipes.format_recipe(*case) for case in CASES]
# By number of replicas; with four, two synchronizations of the longest interval have to do.
STEPS = {1: 10, 2: 10, 4: 8}


@torch.no_grad()
def _loss(model):
    """On all batches of the first steps, the same for every replica."""
    return loss(model, torch.cat([batch(step, world_size=8) for step in range(8)])).item()


def _replicated(name, steps, options):
    transport = ProcessGroupTransport()
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
    before = _loss(model)
    losses = train(model, optimizer, steps, rank=transport.rank, world_size=transport.world_size)
    with optimizer.shared_weights():
        digest = check_replicas(model.named_parameters(), transport)
        return digest, losses, transport.meter.total, _loss(model) - before


def _every_case(steps):
    results = []
    for name, options in CASES:
        try:
            results.append(_replicated(name, steps, options))
        except BaseException as error:
            error.args = (f"{recipes.format_recipe(name, options)}: {error}",)
            raise
    return results


@cache
def together(world_size):
    """What each case comes to on every replica; the processes are started once for all cases."""
    return dict(
        zip(IDS, zip(*run_replicas(_every_case, world_size, STEPS[world_size]), strict=True), strict=True),
    )


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_replicas_hold_bit_identical_weights_and_learn(case, world_size):
    results = together(world_size)[case]
    assert len(results) == world_size
    assert len({digest for digest, _, _, _ in results}) == 1
    for _, _, traffic, change in results:
        assert change < 0
        assert (traffic.sent_bytes > 0) == (world_size > 1)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_one_replica_in_a_process_group_is_one_without(name, options):
    ((_, losses, _, _),) = together(1)[recipes.format_recipe(name, options)]
    alone = SmallNet()
    assert train(alone, recipes.build(name, alone, lr=0.01, **options), STEPS[1]) == losses


@pytest.mark.parametrize("name", list(UNCOMPRESSED))
def test_density_one_without_a_quantizer_loses_nothing(name):
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, **UNCOMPRESSED[name])
    train(model, optimizer, 5)
    for state in optimizer.state.values():
        residual = state["outer"]["exchange"]["residual"]
        assert torch.equal(residual, torch.zeros_like(residual))


def test_the_first_step_of_distro_is_the_sign_of_what_was_selected():
    """With k at the chunk's size and no quantizer's loss, DisTrO's first step is signSGD's."""
    model = SmallNet()
    before = weights(model)
    optimizer = recipes.build(
        "distro", model, lr=0.01, k=4096, scale="chunk", subtract="decoded", weight_decay=0.0
    )
    train(model, optimizer, 1)
    for name, weight in weights(model).items():
        moved = (before[name] - weight).abs()
        assert ((moved - 0.01).abs() < 1e-6).float().mean() > 0.9, name


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("muon", ("muon", {})),
        ("local_muon(interval=10, density=0.02)", ("local_muon", {"interval": 10, "density": 0.02})),
        ("muon(split={'qkv': 3}, nesterov=False)", ("muon", {"split": {"qkv": 3}, "nesterov": False})),
    ],
)
def test_the_textual_form_round_trips(text, parsed):
    assert recipes.parse_recipe(text) == parsed
    assert recipes.parse_recipe(recipes.format_recipe(*parsed)) == parsed


@pytest.mark.parametrize(
    "text", ["", "muon(", "muon(0.1)", "a.b()()", "muon(lr=x)", "muon; import os", "[1]", "f(g())"]
)
def test_what_is_no_recipe_says_how_to_write_one(text):
    with pytest.raises(UsageError, match="does not parse"):
        recipes.parse_recipe(text)


@pytest.mark.parametrize(
    "name", ["no_such_module.muon", "math.pi", "math.no", "muonwire.recipes.find", "a..b"]
)
def test_a_name_with_dots_is_imported_and_a_recipe(name):
    assert recipes.find("muonwire.recipes.dense.muon") is recipes.RECIPES["muon"]
    with pytest.raises(UsageError, match=r"cannot be imported.*module\.function"):
        recipes.find(name)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lion", {}, "allowed are adamw, muon, distro, one_bit_muon"),
        ("approach_d", {"dense": ["nothing"]}, "matches no hidden matrix; the names are"),
        ("approach_f", {"period": 0}, "at least 1 step"),
        ("distro_weight_polar", {"strength": 0.0}, r"strength in \(0, 1\]"),
        ("dion", {"fraction": 1.5}, r"fraction in \(0, 1\]"),
        ("powersgd_muon", {"wire": "int8"}, "allowed are float32, bfloat16"),
        ("signmuon", {"rms": 0.0}, "must be positive"),
        ("normuon", {"row_beta2": 1.0}, r"beta2 lies in \[0, 1\)"),
        ("muon", {"beta": 0.9}, "'beta' is not an option; allowed are .*momentum"),
        ("muon", {"momentum": "much"}, "a number is wanted"),
        ("muon", {"momentum": 1.0}, r"must lie in \[0, 1\)"),
        ("muon", {"adam_lr_ratio": 0}, "must be positive"),
        ("local_muon", {"interval": 0}, "at least 1"),
        ("local_muon", {"interval": 2.5}, "a whole number"),
        ("local_muon", {"interval": "often"}, "a number, 'auto', or the path"),
        ("local_muon", {"density": 0.0}, r"must lie in \(0, 1\]"),
        ("local_muon", {"density": 1.01}, r"must lie in \(0, 1\]"),
        ("local_muon", {"codec": "zip"}, "not a part"),
        ("local_muon", {"outer_lr": 0}, "must be positive"),
        ("distro", {"k": 0}, "at least 1"),
        ("distro", {"subtract": "all"}, "decoded and selected"),
    ],
)
def test_bad_recipes_and_options_say_what_is_allowed(name, options, says):
    with pytest.raises(UsageError, match=says):
        recipes.build(name, SmallNet(), lr=0.01, **options)


@pytest.mark.parametrize("lr", [-0.1, math.nan])
def test_bad_rates_are_refused(lr):
    with pytest.raises(UsageError, match="at least 0"):
        recipes.build("muon", SmallNet(), lr=lr)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(UsageError, match="no trainable parameter"):
        recipes.build("adamw", torch.nn.Identity(), lr=0.1)


def test_parts_of_one_bit_muon_are_turns_without_feedback():
    optimizer = recipes.one_bit_muon(SmallNet(), lr=0.02, interval=3, parts=4)
    chains = {chain for group in optimizer.param_groups for chain in group["outer_chains"]}
    assert any("exchange(turns(parts=4) | sign(scale=tensor), over=senders" in chain for chain in chains)
    assert not any("EF14" in chain for chain in chains)
    net = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    optimizer = recipes.one_bit_muon(net, lr=0.02, interval=3, parts=4, polar=["0"])
    bits = 8 * optimizer.estimate_bytes(replicas=16) / 256**2
    # Headers, a seed and a scale.
    assert 1 / 12 < bits < 1.1 / 12


class Among(SingleReplica):
    """Stands for one of so many replicas, which nothing is exchanged with."""

    def __init__(self, world_size: int, *, elastic: bool = False) -> None:
        super().__init__()
        self.world_size = world_size
        self.elastic = elastic


def form_of(replicas: int, *, elastic: bool = False, **given):
    """H, and whether one_bit_muon takes turns and lengthens, among so many replicas."""
    transport = Among(replicas, elastic=elastic)
    optimizer = recipes.one_bit_muon(SmallNet(), lr=0.02, transport=transport, **given)
    text = optimizer.param_groups[0]["outer_chains"][0]
    return optimizer.local.interval, "turns(parts=4)" in text, "lengthen" in text


def test_many_replicas_take_turns_where_nothing_else_is_given():
    assert form_of(1) == form_of(7) == (11, False, False)
    assert form_of(8) == form_of(16) == (3, True, True)
    # Their number changes from one synchronization to the next.
    assert form_of(8, elastic=True) == (11, False, False)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"interval": 11}, (11, False, False)),
        ({"interval": "auto"}, ("auto", False, False)),
        ({"parts": 1}, (11, False, False)),
        ({"feedback_decay": 0.3}, (11, False, False)),
        ({"fragments": 4, "delay": 2}, (11, False, False)),
        ({"means": "recompressed"}, (11, False, False)),
        ({"lengthen": True}, (11, False, True)),
        ({"outer_momentum": 0.5, "momentum": 0.95}, (3, True, True)),
        ({"parts": 4}, (3, True, True)),
        ({"parts": 4, "lengthen": False, "interval": 9}, (9, True, False)),
    ],
)
def test_what_is_given_of_the_synchronization_is_not_changed_by_the_number_of_replicas(given, form):
    assert form_of(16, **given) == form
    if "outer_momentum" not in given:
        assert form_of(2, **given) == form


def test_parts_leave_no_room_for_feedback_or_another_selection():
    with pytest.raises(
        UsageError, match=r"feedback_decay is given but does nothing here; it acts only with parts=1"
    ):
        recipes.build("one_bit_muon", SmallNet(), lr=0.02, parts=4, feedback_decay=0.5)
    with pytest.raises(UsageError, match="parts is 0; it must be an integer of at least 1"):
        recipes.build("one_bit_muon", SmallNet(), lr=0.02, parts=0)
    with pytest.raises(UsageError, match="codec"):
        recipes.build("one_bit_muon", SmallNet(), lr=0.02, parts=2, codec="topk(density=0.1) | float32")
