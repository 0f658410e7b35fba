"""Optimizers whose weights lie on a device: how often the host waits for it, and what crosses; on the stand-in of benchmarks/."""

import warnings

import pytest
import torch
from benchmarks.host_crossings import measure_codec, measure_recipe, model, on_two_replicas
from benchmarks.standin import DEVICE, StandIn

from muonwire import recipes
from muonwire.codec import host, parse
from muonwire.errors import NonFiniteUpdateError
from muonwire.optim.agreement import Agreement
from muonwire.stages import EF14, Context, Delayed, Exchange, MatrixLayout, Polar, Serve
from muonwire.stages.power import PowerSGD
from muonwire.transport import Flag, SingleReplica


@pytest.mark.parametrize(
    ("name", "options", "bytes_an_entry"),
    [
        ("one_bit_muon", {"interval": 2}, 1 / 8),
        ("ef14_muon", {}, 0.05),
        ("distro", {}, 0.05),
    ],
)
def test_the_host_waits_once_a_local_step_and_twice_an_exchange(name, options, bytes_an_entry):
    """Once for the gradients and for edits of the weights, once for the bytes of all groups."""
    found = measure_recipe(name, options)
    exchanging = found["exchanging"]
    assert exchanging["waits"] == 2
    assert exchanging["waits_to_device"] == 0
    # Scales and sums besides.
    assert exchanging["to_host_bytes"] <= bytes_an_entry * found["parameters"] + 500
    assert exchanging["to_device_bytes"] <= 2 * (bytes_an_entry * found["parameters"] + 1000)
    if options:
        assert found["alone"]["waits"] == 1
        assert found["alone"]["to_device_bytes"] == found["alone"]["waits_to_device"] == 0
        assert found["alone"]["to_host_bytes"] <= 32


def test_a_dense_mean_crosses_as_it_is():
    found = measure_recipe("muon", {})
    assert found["exchanging"]["waits"] == 2
    assert found["exchanging"]["to_host_bytes"] - 4 * found["parameters"] <= 32


@pytest.mark.parametrize(
    ("codec", "waits"),
    [
        ("sign(scale=row)", 1),
        ("ternary(scale=row)", 1),
        ("int(bits=4)", 1),
        ("codebook(bits=2, fit=gaussian)", 1),
        ("bfloat16", 1),
        ("dct(chunk=64) | topk(k=32) | sign(scale=none)", 1),
        ("hadamard | sign(scale=chunk)", 1),
        # The scale is agreed first.
        ("sign(scale=shared)", 2),
        # Whether a code is none, and how large a product of factors is, the device alone knows.
        ("int(bits=3)", 2),
        ("lowrank(rank=4) | bfloat16", 2),
    ],
)
def test_the_host_waits_for_the_updates_only_where_bytes_do_not_bound_them(codec, waits):
    assert measure_codec(codec)["waits"] == waits


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local_adamw", {"interval": 2}),
        ("local_adamw", {"interval": 2, "codec": "tiles(chunk=16) | topk(k=4) | int(bits=4, scale=chunk)"}),
        (
            "local_adamw",
            {
                "interval": 2,
                "codec": "sign(scale=shared)",
                "vector_codec": "sign(scale=shared)",
                "means": "lossless",
            },
        ),
        ("local_adamw", {"interval": 2, "codec": "int(bits=4)", "means": "recompressed"}),
    ],
)
def test_a_device_trains_to_the_weights_of_the_cpu(name, options):
    """Without products of matrices every operation is the same there, and so is every bit."""

    def trained(device):
        def run(transport, _):
            built = model(device)
            optimizer = recipes.build(name, built, lr=0.01, transport=transport, **options)
            generator = torch.Generator().manual_seed(transport.rank)
            for _ in range(4):
                for param in built.parameters():
                    param.grad = torch.randn(param.shape, generator=generator).to(device)
                optimizer.step()
            states = [state for p in built.parameters() for state in tensors(optimizer.state[p])]
            assert {t.device for t in states if t.dtype != torch.uint8} == {device}
            return {name: p.detach().cpu() for name, p in built.named_parameters()}

        return on_two_replicas(run)

    there, here = trained(DEVICE), trained(torch.device("cpu"))
    assert all(torch.equal(there[name], here[name]) for name in here)


def tensors(state):
    """The tensors of nested states."""
    for value in state.values():
        if isinstance(value, dict):
            yield from tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def test_an_update_that_is_not_finite_is_seen_with_the_bytes():
    """The payload holds zeros then, and the header of its message tells the others why."""
    stage = Exchange(codec=parse("topk(density=0.5) | sign(scale=tensor)"), feedback=EF14())
    with StandIn() as device:
        transport = SingleReplica()
        updates = [torch.ones(4, 4).to(DEVICE), torch.full((4, 4), torch.nan).to(DEVICE)]
        context = Context(lr=0.1, step=1, transport=transport, layouts=[MatrixLayout()] * 2)
        device.forget()
        request = stage.send(updates, updates, [stage.init(u) for u in updates], context)
        assert device.to_host.count == 1
        assert Flag.DIVERGED in transport.requested
    first, second = (
        parse("topk(density=0.5) | sign(scale=tensor)").decode_body(b, (4, 4)) for b in bodies(request)
    )
    assert first.sum() == 8
    assert not second.any()


def bodies(request):
    from muonwire.codec import payload

    return [entry.body for entry in payload.unpack(request.payload)]


def test_a_gradient_that_is_not_finite_is_named_and_an_edit_noticed():
    with StandIn():
        built = model(DEVICE)
        optimizer = recipes.build("local_adamw", built, lr=0.01, interval=2)
        for param in built.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        params = optimizer.trained()
        assert not optimizer.changes.edited(params, optimizer.state)
        with torch.no_grad():
            params[0].add_(1)
        question = optimizer.changes.ask(params)
        assert question is not None
        assert [bool(d) for d in question.differ] == [True]
        question.answers = [False]
        assert not optimizer.changes.edited(params, optimizer.state)
        assert optimizer.changes.edited(params, optimizer.state)
        params[1].grad[0] = torch.inf
        with pytest.raises(NonFiniteUpdateError, match=r"gradient of .* is not finite"):
            optimizer.step()


def test_factors_of_low_rank_stay_on_the_device():
    stage = PowerSGD(rank=2)
    with StandIn() as device:
        update = torch.randn(6, 4).to(DEVICE)
        states = [stage.init(update)]
        context = Context(lr=0.1, step=1, transport=SingleReplica(), layouts=[MatrixLayout()])
        device.forget()
        (result,) = stage.apply([update], [update], states, context)
        assert result.device == DEVICE
        assert device.to_host.num_bytes <= 4


@pytest.mark.parametrize(
    ("recipe", "options"), [("distro", {}), ("diloco", {"interval": 1, "codec": "sign", "lengthen": True})]
)
def test_a_device_without_float64_trains_to_the_weights_of_the_cpu(monkeypatch, recipe, options):
    """Whole tensors cross for the codecs, so that even transforms round as on the CPU."""

    def trained(device):
        built = model(device)
        optimizer = recipes.build(recipe, built, lr=0.01, **options)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for param in built.parameters():
                param.grad = torch.randn(param.shape, generator=generator).to(device)
            optimizer.step()
        return [p.detach().cpu() for p in built.parameters()]

    here = trained(torch.device("cpu"))
    monkeypatch.setattr(host, "WITHOUT_FLOAT64", {DEVICE.type})
    with StandIn(float64=False):
        there = trained(DEVICE)
    assert all(map(torch.equal, there, here))


def test_gpus_of_one_class_but_different_names_warn_where_all_multiply_alike():
    """Two generations of GPU choose other kernels for the same product, and so another order of additions."""

    def meet(rank, make):
        found = []
        for multiplies in (True, False):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                agreed = Agreement().reach(
                    make(),
                    description="groups",
                    processor="gpu_bf16",
                    machine=f"GPU {rank}",
                    multiplies=multiplies,
                )
            found.append((agreed, [str(w.message) for w in caught]))
        return found

    transport = SingleReplica()
    assert meet(0, lambda: transport) == [("gpu_bf16", [])] * 2
    transport.gather = lambda payload, **_: [payload, payload[:-1] + b"1"]
    (agreed, (message,)), quiet = meet(0, lambda: transport)
    assert agreed == "gpu_bf16"
    assert "(gpu_bf16 GPU 0, gpu_bf16 GPU 1 by rank)" in message
    assert quiet == ("gpu_bf16", [])


def test_products_of_matrices_are_known_by_their_stages():
    """So that replicas on machines that round differently are warned."""
    by_codec = {
        text: Exchange(codec=parse(text)).multiplies
        for text in ("dct | topk(k=4) | sign(scale=none)", "sign")
    }
    assert list(by_codec.values()) == [True, False]
    assert PowerSGD(rank=2).multiplies
    assert Polar().multiplies
    assert Delayed(through=Exchange(codec=parse("dct | float32"))).multiplies
    # Only the owner multiplies, and sends what came of it.
    assert not Serve(stage=Polar(), codec=parse("float32")).multiplies


def test_a_scaler_takes_one_wait():
    with StandIn() as device:
        built = model(DEVICE)
        optimizer = recipes.build("local_adamw", built, lr=0.01, interval=3)
        for found_inf in (0.0, 1.0):
            for param in built.parameters():
                param.grad = torch.full_like(param, 8.0)
            optimizer.grad_scale = torch.tensor(4.0).to(DEVICE)
            optimizer.found_inf = torch.tensor(found_inf).to(DEVICE)
            device.forget()
            optimizer.step()
            # Another one for the gradients, or for edits of the weights alone.
            assert device.to_host.count == 2
            assert {float(p.grad.unique()[0].cpu()) for p in built.parameters()} == {
                8.0 if found_inf else 2.0
            }
        assert optimizer.skipped_steps == 1
