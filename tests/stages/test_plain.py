"""A stage out of a function."""

import copy
import io
import pickle

import pytest
import torch

from muonwire import stages
from muonwire.errors import UsageError
from muonwire.optim import ChainOptimizer
from tests.models import SmallNet, train, weights
from tests.stages.test_stages import context, updates


def halve(update):
    return update / 2


def towards_zero(update, param):
    return update + 0.1 * param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_function_of_each_tensor_and_leaves_its_inputs(dtype):
    given, params = updates(dtype), updates(dtype, seed=1)
    before = copy.deepcopy(given)
    stage = stages.plain(halve, name="halve")
    results = stage.apply(given, params, [{} for _ in params], context(len(params)))
    assert all(torch.equal(r, g / 2) and r.dtype == dtype for r, g in zip(results, given, strict=True))
    assert all(torch.equal(g, b) for g, b in zip(given, before, strict=True))
    assert stage.init(params[0]) == {}
    assert not stage.talks


@pytest.mark.parametrize(
    ("function", "with_param"),
    [
        (halve, False),
        (torch.sign, False),
        (torch.nn.functional.softsign, False),
        (lambda update, scale=2.0: update * scale, False),
        (lambda *tensors: tensors[0], False),
        (lambda update, *, scale=2.0: update * scale, False),
        (towards_zero, True),
        (lambda update, param, scale=2.0: update * scale - param, True),
    ],
)
def test_it_takes_the_parameter_where_the_function_wants_two(function, with_param):
    given, params = updates(), updates(seed=1)
    results = stages.plain(function, name="f").apply(given, params, [{}] * len(params), context(len(params)))
    for result, update, param in zip(results, given, params, strict=True):
        assert torch.equal(result, function(update, param) if with_param else function(update))


def test_its_text_and_its_place_in_a_chain_are_its_name():
    clip = stages.plain(lambda update: update.clamp(-1, 1), name="clip")
    assert str(clip) == clip.name == "clip"
    chain = stages.chain(clip, stages.Momentum(), clip)
    assert [name for name, _ in chain.members] == ["clip", "momentum", "clip_2"]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda u: u.sum(), r"clip: the function returned a tensor of shape \(\) and dtype float32 for the "
         r"update of tensor 0; a tensor of shape \(6, 9\) and dtype float32 is wanted"),
        (lambda u: u > 0, r"returned a tensor of shape \(6, 9\) and dtype bool"),
        (lambda u: None, "returned a NoneType"),
    ],
)  # fmt: skip
def test_results_of_another_kind_are_refused(function, says):
    stage = stages.plain(function, name="clip")
    with pytest.raises(UsageError, match=says):
        stage.apply(updates(), updates(), [{}] * 7, context(7))


def test_in_an_optimizer_the_error_names_the_parameter_and_nothing_has_moved():
    model = SmallNet()
    chain = stages.chain(stages.plain(lambda u: u.flatten(), name="flat"))
    named = [{"params": list(model.parameters()), "names": [n for n, _ in model.named_parameters()]}]
    optimizer = ChainOptimizer(named, chain=chain, lr=0.1)
    before = weights(model)
    with pytest.raises(UsageError, match=r"flat: .* for the update of embed.weight; .* \(16, 8\)"):
        train(model, optimizer, 1)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())


@pytest.mark.parametrize(
    ("function", "name", "says"),
    [
        (halve, "", "without a dot"),
        (halve, "a.b", "without a dot"),
        (lambda: None, "none", "has 0 positional arguments"),
        (lambda a, b, c: a, "three", "has 3 positional arguments.*the update and the parameter"),
    ],
)
def test_bad_functions_and_names_say_what_is_allowed(function, name, says):
    with pytest.raises(UsageError, match=says):
        stages.plain(function, name=name)


def test_it_can_be_pickled_where_its_function_can():
    stage = pickle.loads(pickle.dumps(stages.plain(towards_zero, name="towards_zero")))
    assert stage == stages.plain(towards_zero, name="towards_zero")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(stages.plain(lambda u: u, name="same"))


def test_a_chain_with_it_resumes_from_its_state_dict():
    def build(model):
        chain = stages.chain(
            stages.Mean(),
            stages.plain(lambda update: update.clamp(-0.1, 0.1), name="clip"),
            stages.Momentum(beta=0.9),
            stages.plain(towards_zero, name="towards_zero"),
        )
        return ChainOptimizer(list(model.parameters()), chain=chain, lr=0.05)

    whole, halved = SmallNet(), SmallNet()
    expected = train(whole, build(whole), 8)
    first = build(halved)
    losses = train(halved, first, 4)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    second = build(halved)
    second.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
    assert losses + train(halved, second, 4, start=4) == expected
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(halved).items())
