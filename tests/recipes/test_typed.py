"""Recipes as functions: their signatures, their docstrings, and what is refused at run time."""

import inspect
from dataclasses import MISSING, dataclass, fields

import pytest
import torch

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.optim import ChainOptimizer
from muonwire.recipes.base import RecipeSettings
from muonwire.recipes.define import recipe, recipe_of
from muonwire.recipes.describe import UNDESCRIBED, default_of, meanings
from muonwire.stages import Mean, Sign, chain
from muonwire.transport import SingleReplica
from tests.models import RECIPE_OPTIONS, SmallNet, train, weights

NAMES = list(recipes.RECIPES)


def build_both(name, **options):
    """By its function, and by its name."""
    return [
        getattr(recipes, name)(SmallNet(), **options),
        recipes.build(name, SmallNet(), **options),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_a_function_of_the_package(name):
    function = getattr(recipes, name)
    assert getattr(recipes.table, name) is function
    assert inspect.isfunction(function)
    assert function.__name__ == name
    assert recipe_of(function) is recipes.RECIPES[name]
    by_function, by_name = build_both(name, lr=0.01, **RECIPE_OPTIONS.get(name, {}))
    assert type(by_function) is ChainOptimizer
    assert str(by_function) == str(by_name)


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_is_that_of_the_settings(name):
    signature = inspect.signature(getattr(recipes, name))
    (model, lr, transport, *options) = signature.parameters.values()
    assert (model.name, lr.name, transport.name) == ("model", "lr", "transport")
    assert model.annotation is torch.nn.Module
    assert signature.return_annotation is ChainOptimizer
    assert lr.default is lr.empty
    settings = {f.name: f for f in fields(recipes.RECIPES[name].options)}
    assert [p.name for p in (lr, transport, *options)] == list(settings)
    for option in (transport, *options):
        assert option.kind is option.KEYWORD_ONLY
        assert option.annotation == settings[option.name].type
        assert option.default == default_of(settings[option.name]) is not MISSING


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_has_the_chain_every_option_with_its_default_the_errors_and_the_source(name):
    text = getattr(recipes, name).__doc__
    recipe = recipes.RECIPES[name]
    assert f"Chain: {recipe.summary}" in text
    assert f"Source: {recipe.source}." in text
    assert "Raises:\n    UsageError:" in text
    arguments = text.split("Args:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(":")[0].strip() for line in arguments] == [
        "model",
        *(f.name for f in fields(recipe.options)),
    ]
    for line in arguments[2:]:
        assert "Default: " in line
        assert len(line.split(": ", 1)[1].split("Default:")[0]) > 3, line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": 0.01, "beta": 0.9}, "'beta' is not an option; allowed are start, .*"),
        ({"lr": 0.01, "weight_decay": "much"}, "weight_decay is 'much'; a number is wanted, such as 0"),
        ({"lr": 0.01, "masters": 1}, "masters is 1; True or False is wanted, such as True"),
        ({"lr": 0.01, "exclude_buffers": "mean"}, "exclude_buffers is 'mean'; a list of texts is wanted"),
        ({"lr": 0.01, "start": None}, "start is None; allowed are check and broadcast"),
        ({"lr": "much"}, "lr is 'much'; a number is wanted, such as 0.01"),
        ({"lr": -0.1}, "lr is -0.1; it must be at least 0"),
    ],
)
def test_both_ways_refuse_alike(name, options, says):
    messages = []
    for build in (getattr(recipes, name), lambda *args, **given: recipes.build(name, *args, **given)):
        with pytest.raises(UsageError, match=says) as error:
            build(SmallNet(), **options)
        messages.append(str(error.value))
    assert len(set(messages)) == 1
    assert messages[0].startswith("recipe")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("local_muon", {"density": 0.1, "codec": "float32"}, "codec is given but .* only without density"),
        ("one_bit_muon", {"density": 0.1}, "'density' is not an option"),
        ("muloco", {"density": 0.1}, "'density' is not an option"),
        ("one_bit_muon", {"row_beta2": 0.9}, "only with normalize_rows=True"),
        ("one_bit_muon", {"feedback": False, "feedback_decay": 0.9}, "only with feedback=True"),
        ("diloco", {"feedback_decay": 0.9}, "only with feedback=True"),
        ("local_adamw", {"outer_nesterov": False}, "only with an outer_momentum"),
        ("approach_b", {"owners": "all"}, "owners is given but does nothing here; it acts only with server=True"),
        ("approach_b", {"wire": "float32"}, "only with server=True"),
        ("approach_b", {"momentum": 0.9}, "'momentum' is not an option"),
        ("approach_a", {"scale": "none"}, "'scale' is not an option"),
        ("sgd_weight_polar", {"scale": "none"}, "'scale' is not an option"),
        ("sgd_weight_polar", {"period": 0, "strength": 0.5}, "only with a period"),
        ("powersgd_muon", {"fraction": 0.5, "rank": 2}, "only without fraction"),
        ("psyche", {"masters": False}, "only with look_ahead=False"),
        ("muonfast", {"beta1": 0.9}, 'only with rest="adam"'),
        ("muonfast", {"eps": 1e-6}, 'only with rest="adam" or a preconditioner'),
        ("muonfast", {"keep_norm": True, "scale": "rms"}, "only without keep_norm"),
    ],
)  # fmt: skip
def test_an_option_that_does_nothing_is_refused(name, options, says):
    with pytest.raises(UsageError, match=says):
        getattr(recipes, name)(SmallNet(), lr=0.01, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local_muon", {"density": 0.1}),
        ("local_muon", {"codec": "float32"}),
        ("local_adamw", {"outer_momentum": 0.5, "outer_nesterov": False}),
        ("one_bit_muon", {"normalize_rows": True, "row_beta2": 0.9}),
        ("approach_b", {"server": True, "owners": "all", "wire": "float32"}),
        ("sgd_weight_polar", {"period": 2, "strength": 0.5}),
        ("powersgd_muon", {"fraction": 0.5}),
        ("psyche", {"masters": False, "look_ahead": False}),
        ("muonfast", {"preconditioner": "after", "eps": 1e-6}),
    ],
)
def test_options_that_act_together_are_accepted_together(name, options):
    build_both(name, lr=0.01, **options)


def changed(default):
    """A value other than the default that most options allow."""
    others = {
        "rms": "spectral",
        "auto": "svd",
        "one": "all",
        "svd": "power",
        "selected": "decoded",
        "bfloat16": "float32",
        "replicas": "senders",
        "sgd": "adam",
    }
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return default / 2 if default else 0.5
    if isinstance(default, int):
        return default + 1
    return others.get(default) if isinstance(default, str) else None


# Options that show in something other than the chains of a small net's optimizer, or act with another one.
ELSEWHERE = {
    "start",
    "nonfinite",
    "masters",
    "exclude_buffers",
    "polar",
    "adam",
    "split",
    "interval",
    "growth",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_acts(name):
    """What it changes can be read in the optimizer's text, at least."""
    function, given = getattr(recipes, name), RECIPE_OPTIONS.get(name, {})
    idle = recipes.RECIPES[name].options(lr=0.01).idle()
    for option in fields(recipes.RECIPES[name].options):
        value = changed(default_of(option))
        if option.name in {"lr", "transport", *ELSEWHERE, *idle} or value is None:
            continue
        extra = {"scale": "chunk"} if option.name == "subtract" else {}
        other = function(SmallNet(), lr=0.01, **{**given, option.name: value, **extra})
        assert describe(other) != describe(function(SmallNet(), lr=0.01, **given, **extra)), option.name


def describe(optimizer):
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    return str(optimizer), rates, optimizer.look_ahead, optimizer.local


def test_options_by_place_and_a_missing_rate_are_refused():
    with pytest.raises(UsageError, match=r"0\.01 is a positional argument; give options by name"):
        recipes.muon(SmallNet(), 0.01)
    with pytest.raises(UsageError, match="recipe muon: lr is missing"):
        recipes.muon(SmallNet())


def test_whole_numbers_may_be_written_with_a_point():
    assert recipes.local_muon(SmallNet(), lr=0.01, interval=4.0).local.interval == 4
    for value in (2.5, float("inf"), True):
        with pytest.raises(
            UsageError, match="a whole number or a text or a list of pairs of whole numbers is wanted"
        ):
            recipes.local_muon(SmallNet(), lr=0.01, interval=value)


def test_it_trains_as_by_name():
    first, second = SmallNet(), SmallNet()
    train(first, recipes.muon(first, lr=0.01, transport=SingleReplica(), momentum=0.9), 3)
    train(second, recipes.build("muon", second, lr=0.01, momentum=0.9), 3)
    assert all(torch.equal(w, weights(second)[n]) for n, w in weights(first).items())


@dataclass(frozen=True, kw_only=True)
class TerseSettings(RecipeSettings):
    often: bool = False


def test_a_recipe_of_one_s_own_needs_no_docstrings():
    @recipe(TerseSettings, summary="mean → sign", source="a user")
    def terse(model, options):
        return options.uniform(model, chain(Mean(), Sign()))

    assert meanings(TerseSettings)["often"] == UNDESCRIBED
    assert f"    often: {UNDESCRIBED}. Default: False." in terse.__doc__
    assert type(terse(SmallNet(), lr=0.1, often=True)) is ChainOptimizer
    for name in NAMES:
        assert UNDESCRIBED not in getattr(recipes, name).__doc__, name
