"""Replicas that are groups of processes with sharded weights do what unsharded ones do."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from muonwire import codec, recipes, stages
from muonwire.errors import ExchangeError, NonFiniteUpdateError, ReplicaLostError, UsageError
from muonwire.optim import shards
from muonwire.optim.around import local_steps
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.settings import Lifecycle, LocalSteps
from muonwire.transport import ProcessGroupTransport, check_replicas, mesh_transport, run_threads
from muonwire.transport.shards import local
from tests.optim.sharded_nets import (
    OPTIONS,
    STEPS,
    advance,
    build,
    give_gradients,
    loss_of,
    meshed,
    net,
    shard,
    weights,
)
from tests.replicas import run_replicas

# Their arithmetic is the same, tensor by tensor. Polar factors of one shape are computed together, by other products.
EXACT = ("adamw", "distro", "one_bit_muon", "dion")
ROUNDED = ("muon", "normuon")
SAVED = ("one_bit_muon", "distro", "normuon", "powersgd_muon")


def _train(folder):
    """Of every recipe: the weights, bytes and all-to-alls of a run, which leaves a checkpoint on its way."""
    found = {}
    for name in OPTIONS:
        model, optimizer = build(name, (2, 2))
        transport = optimizer.transport
        advance(model, optimizer, range(3))
        if name in SAVED:
            dcp.save(
                dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)),
                checkpoint_id=f"{folder}/{name}/{transport.rank}",
                process_group=transport.group,
            )
        before = transport.swaps.total.num_messages
        advance(model, optimizer, range(3, STEPS))
        swaps = transport.swaps.total.num_messages - before
        optimizer.synchronize()
        digest = check_replicas(model, transport)
        sent = transport.meter.by_purpose["update"]
        found[name] = (weights(model, optimizer), sent.sent_bytes, sent.num_messages, swaps, digest)
    return found


def build_whole(name, model=None, transport=None):
    return recipes.build(name, model or net(), lr=0.02, transport=transport, **OPTIONS[name])


def _whole(name):
    def worker(rank, make):
        model, transport = net(), make()
        optimizer = build_whole(name, model, transport)
        advance(model, optimizer, range(STEPS))
        optimizer.synchronize()
        sent = transport.meter.by_purpose["update"]
        return weights(model, optimizer), sent.sent_bytes, sent.num_messages

    return run_threads(worker, replicas=2)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def trained(folder):
    return run_replicas(_train, 4, str(folder))


@pytest.mark.parametrize("name", OPTIONS)
def test_sharded_replicas_do_what_whole_ones_do(name, trained):
    (expected, whole_bytes, num_whole), by_process = _whole(name), [found[name] for found in trained]
    for made, *_ in by_process:
        for mine, theirs in zip(made, expected, strict=True):
            if name in EXACT:
                assert torch.equal(mine, theirs)
            elif name in ROUNDED:
                # Five iterations, each of three products of at most 33 terms, on entries of a step of 0.2 √33 · lr, 5 steps; small
                # singular values are multiplied by up to 8 in the first iterations, and their rounding with them.
                rounding = 15 * 33 * torch.finfo(torch.float32).eps * 0.2 * 33**0.5 * 0.02 * STEPS
                assert (mine - theirs).abs().max() <= 8 * rounding
            else:
                # The polar factor of a matrix of rank 4: what the products round to in its null space grows to its size.
                assert (mine - theirs).abs().max() <= 0.05 * 0.02 * STEPS
    assert len({digest for *_, digest in by_process}) == 1
    # The same bodies. A frame has 16 bytes, a mean is filled up to a multiple of the replicas' number, and the payload of each of
    # the two groups names its codec behind a length, in 80 bytes at most.
    overhead = 16 + 2 * 80 if name in ("distro", "one_bit_muon") else 24
    for r in range(2):
        of_replica = by_process[2 * r : 2 * r + 2]
        sent, num_messages = (sum(found[k] for found in of_replica) for k in (1, 2))
        assert num_messages == 2 * num_whole
        assert 0 < sent - whole_bytes <= overhead * num_whole


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_has_one_all_to_all_there_and_one_back(name, trained):
    # Steps 3 and 4; one_bit_muon synchronizes in the first of them.
    expected = {"adamw": 0, "one_bit_muon": 2 * 2 + 2}.get(name, 2 * 2)
    assert all(found[name][3] == expected for found in trained)


def _resume(folder, shape, names):
    found = {}
    for name in names:
        if shape[1] == 0:
            # A mesh of single processes, whose weights are whole.
            model = net()
            optimizer = build_whole(name, model, mesh_transport(meshed((2, 1))))
        else:
            model, optimizer = build(name, shape)
        group = optimizer.transport.group
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=f"{folder}/{name}/{optimizer.transport.rank}", process_group=group)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        advance(model, optimizer, range(3, STEPS))
        optimizer.synchronize()
        found[name] = weights(model, optimizer)
    return found


@pytest.mark.parametrize(
    ("shape", "names"), [((2, 2), SAVED[2:]), ((2, 0), SAVED[:2]), ((2, 1), SAVED[:2]), ((2, 4), SAVED[:1])]
)
def test_a_distributed_checkpoint_goes_on_with_any_number_of_processes(shape, names, trained, folder):
    """At 2 × 0 the replicas are single processes with whole weights."""
    resumed = run_replicas(_resume, shape[0] * max(shape[1], 1), str(folder), shape, names)
    for name in names:
        for found in resumed:
            for mine, theirs in zip(found[name], trained[0][name][0], strict=True):
                assert torch.equal(mine, theirs), (name, shape)


def _loop(model, optimizer, forward, *, replica, half=None):
    for step in range(STEPS):
        loss_of(forward, replica=replica, step=step, half=half).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model, optimizer)


def _learn():
    """Real gradients, of halves of each replica's batch; of "copies" by DistributedDataParallel."""
    found = {}
    replica, half = divmod(dist.get_rank(), 2)
    for name in ("muon", "adamw"):
        model, optimizer = build(name, (2, 2))
        found[name] = _loop(model, optimizer, model, replica=replica, half=half)
    mesh, model = meshed((2, 2)), net()
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh["shard"].get_group())
    optimizer = build_whole("muon", model, mesh_transport(mesh, copies=True))
    found["copies"] = _loop(model, optimizer, wrapped, replica=replica, half=half)
    return found


def test_a_loop_with_backward_passes_and_clipping_is_that_of_whole_replicas():
    def worker(rank, make, name):
        model = net()
        return _loop(model, build_whole(name, model, make()), model, replica=rank)

    learned = run_replicas(_learn, 4)
    for what, name in (("muon", "muon"), ("adamw", "adamw"), ("copies", "muon")):
        expected = run_threads(lambda rank, make, name=name: worker(rank, make, name), replicas=2)[0]
        for found in learned:
            starts = net().parameters()
            for mine, theirs, start in zip(found[what], expected, starts, strict=True):
                # Gradients that are rounded otherwise by some eps; Adam divides by their size, and a polar factor by the least
                # singular value, so that their relative error grows. The change itself is a hundred times as large.
                assert (mine - theirs).abs().max() <= 0.01 * (theirs - start).abs().max() + 1e-7


def _said(act):
    try:
        act()
    except Exception as error:
        return type(error), str(error)
    return None


def _troubles():
    """What each process says where something goes wrong on process 1 of replica 1 alone."""
    found = {}
    here = dist.get_rank() == 3

    def spoil(model):
        give_gradients(model, replica=dist.get_rank() // 2, step=9)
        if here:
            local(model.hidden[0].weight.grad)[0, 0] = float("nan")

    for name in ("muon", "distro"):
        model, optimizer = build(name, (2, 2))
        advance(model, optimizer, range(1))
        before = weights(model, optimizer)
        spoil(model)
        said = _said(optimizer.step)
        after = weights(model, optimizer)
        same = all(map(torch.equal, before, after))
        optimizer.zero_grad()
        advance(model, optimizer, range(1, 2))
        found[f"nan {name}"] = (said, same, optimizer.num_steps)
    model, optimizer = build("distro", (2, 2), nonfinite="skip")
    spoil(model)
    optimizer.step()
    advance(model, optimizer, range(2))
    found["skip"] = (optimizer.skipped_steps, optimizer.num_steps)
    model, optimizer = build("one_bit_muon", (2, 2), nonfinite="skip")
    spoil(model)
    optimizer.step()
    advance(model, optimizer, range(1))
    found["skip alone"] = (optimizer.skipped_steps, check_replicas(model, optimizer.transport))
    optimizer.found_inf = torch.tensor(float(here))
    give_gradients(model, replica=0, step=0)
    optimizer.step()
    found["overflow"] = optimizer.skipped_steps
    model, optimizer = build("muon", (2, 2))
    advance(model, optimizer, range(1))
    with torch.no_grad():
        if here:
            local(model.hidden[0].weight).add_(1.0)
    found["edited"] = _said(lambda: advance(model, optimizer, range(1, 2)))
    return found


def test_what_goes_wrong_on_one_process_is_one_error_on_all():
    for rank, found in enumerate(run_replicas(_troubles, 4)):
        for name in ("muon", "distro"):
            (kind, text), same, steps = found[f"nan {name}"]
            assert kind is NonFiniteUpdateError
            assert ("hidden.0.weight" in text) is (rank >= 2)
            assert ("on process 1 of this replica" in text) is (rank == 2)
            assert same
            assert steps == 2
        assert found["skip"] == (1, 2)
        assert found["skip alone"][0] == (1 if rank >= 2 else 0)
        assert found["overflow"] == found["skip alone"][0] + (1 if rank >= 2 else 0)
        kind, text = found["edited"]
        assert kind.__name__ == "DivergedReplicasError"
        assert "hidden.0.weight" in text


def _alone():
    """One replica of two processes."""
    found = {}
    mesh = init_device_mesh("cpu", (2,))
    here = dist.get_rank() == 1

    def built(chain):
        model = shard(net(), mesh)
        params = [model.hidden[0].weight, model.hidden[2].weight]
        return model, ChainOptimizer([{"params": params, "chain": chain}], lr=0.1)

    def refuse(update):
        if here:
            raise RuntimeError("no")
        return update

    model, optimizer = built(stages.chain(stages.Momentum(), stages.plain(refuse, name="refuse")))
    give_gradients(model, replica=0, step=0)
    found["stage"] = _said(optimizer.step)
    model, optimizer = built(stages.Polar())
    optimizer.param_groups[0]["lr"] = 0.2 if here else 0.1
    give_gradients(model, replica=0, step=0)
    found["rates"] = _said(optimizer.step)
    model, optimizer = built(stages.Polar())
    give_gradients(model, replica=0, step=0)
    model.hidden[0].weight.grad = None if here else model.hidden[0].weight.grad
    found["gradients"] = _said(optimizer.step)
    # In as many all-to-alls as the buckets need, and with the weights where a stage reads them.
    decay = stages.plain(lambda update, param: update + param / param.norm(), name="decay")
    made = []
    for limit in (shards.BUCKET_BYTES, 64):
        before, shards.BUCKET_BYTES = shards.BUCKET_BYTES, limit
        model, optimizer = built(stages.chain(decay, stages.Polar(dtype="float32")))
        advance(model, optimizer, range(2))
        shards.BUCKET_BYTES = before
        made.append((weights(model, optimizer), optimizer.transport.swaps.total.num_messages))
    found["buckets"] = made
    # Updates of 16-bit weights without masters are wide on their way, too.
    model = shard(net(torch.bfloat16), mesh)
    below = stages.plain(lambda update: update - update.bfloat16().float(), name="below")
    params, lifecycle = [model.hidden[0].weight], Lifecycle(masters=False)
    optimizer = ChainOptimizer(
        params, chain=stages.chain(stages.Momentum(), below), lr=1e6, lifecycle=lifecycle
    )
    before = params[0].full_tensor()
    advance(model, optimizer, range(2))
    found["wide"] = torch.equal(params[0].full_tensor(), before)
    return found


def test_a_replica_that_trains_alone_needs_no_transport():
    first, second = run_replicas(_alone, 2)
    assert first["stage"][0] is ExchangeError
    assert "process 1 of replica 0: no" in first["stage"][1]
    assert second["stage"] == (RuntimeError, "no")
    for found in (first, second):
        assert found["rates"][0] is ExchangeError
        assert found["gradients"][0] is UsageError
        (at_once, swaps), (in_buckets, more_swaps) = found["buckets"]
        assert (swaps, more_swaps) == (4, 4)
        assert not found["wide"]
        assert all(map(torch.equal, at_once, in_buckets))
    model = net()
    params = [model.hidden[0].weight, model.hidden[2].weight]
    decay = stages.plain(lambda update, param: update + param / param.norm(), name="decay")
    chain = stages.chain(decay, stages.Polar(dtype="float32"))
    optimizer = ChainOptimizer([{"params": params, "chain": chain}], lr=0.1)
    advance(model, optimizer, range(2))
    for mine, theirs in zip(first["buckets"][0][0], weights(model, optimizer), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def _refusals():
    found = {}
    mesh = meshed((2, 2))
    model = shard(net(), mesh["shard"])
    transport = mesh_transport(mesh)
    found["whole replicas"] = _said(
        lambda: recipes.build("muon", model, lr=0.1, transport=ProcessGroupTransport())
    )
    found["streaming"] = _said(
        lambda: recipes.build("one_bit_muon", model, lr=0.1, transport=transport, fragments=2)
    )
    found["whole weights"] = _said(lambda: recipes.build("muon", net(), lr=0.1, transport=transport))
    twice = net()
    fully_shard(twice, mesh=mesh)
    found["copies of shards"] = _said(lambda: recipes.build("muon", twice, lr=0.1))
    last = net()
    fully_shard(last.hidden[2], mesh=mesh["shard"])
    groups = [{"params": [last.hidden[0].weight]}, {"params": [last.hidden[2].weight]}]
    found["a part of the weights"] = _said(lambda: ChainOptimizer(groups, chain=stages.Sign(), lr=0.1))
    last.hidden[0].weight.requires_grad_(False)
    optimizer = ChainOptimizer(groups, chain=stages.Sign(), lr=0.1)
    last.hidden[0].weight.requires_grad_(True)
    found["a part is trained later"] = _said(optimizer.step)
    alone = {"outer_chain": stages.Mean(), "local": LocalSteps(interval=2)}
    found["no model"] = _said(lambda: local_steps(torch.optim.SGD(model.parameters(), lr=0.1), **alone))
    optimizer = recipes.build("muon", model, lr=0.1, transport=transport)
    weight = model.hidden[0].weight
    weight.grad = DTensor.from_local(torch.ones(weight.shape), weight.device_mesh, (Replicate(),))
    found["whole gradients"] = _said(optimizer.step)
    # As CPUOffloadPolicy has it on a machine with GPUs.
    weight.device_mesh._device_type = "cuda"
    found["weights beside the mesh"] = _said(lambda: recipes.build("muon", model, lr=0.1))
    other = shard(net(), mesh["replica"])
    found["other axis"] = _said(lambda: recipes.build("muon", other, lr=0.1, transport=transport))
    cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("replica", "shard", "tensor"))
    found["three axes"] = _said(lambda: mesh_transport(cube))
    copies = mesh_transport(mesh, copies=True)
    found["copies"] = (copies.rank, copies.world_size, copies.averages_inside)
    return found


def test_what_cannot_be_done_is_refused_when_it_is_built():
    parts = {
        "whole replicas": "make it with mesh_transport(mesh)",
        "streaming": "use fragments=1 and delay=0",
        "whole weights": "call fully_shard on the whole model",
        "a part is trained later": "group 0[0] is whole on every process",
        "a part of the weights": "group 0[0] is whole on every process",
        "no model": "give model=model",
        "whole gradients": "(Replicate(),), the parameter (Shard(dim=0),)",
        "weights beside the mesh": "fully_shard without CPUOffloadPolicy",
        "copies of shards": "which mesh_transport's first axis stands for",
        "other axis": "with the second axis of the mesh",
        "three axes": 'mesh["replica", "shard"]',
    }
    for rank, found in enumerate(run_replicas(_refusals, 4)):
        for what, part in parts.items():
            kind, text = found[what]
            assert kind is UsageError, what
            assert part in text
        assert found["copies"] == (rank // 2, 2, False)


def _others():
    """16-bit weights, local steps around torch's AdamW, and weights that replica 0 hands to the other."""
    model, optimizer = build("one_bit_muon", (2, 2), dtype=torch.bfloat16)
    text = repr(optimizer)
    advance(model, optimizer, range(3))
    optimizer.synchronize()
    found = {"masters": (weights(model, optimizer), check_replicas(model, optimizer.transport))}
    mesh = meshed((2, 2))
    model = shard(net(), mesh["shard"])
    optimizer = around(model, mesh_transport(mesh))
    advance(model, optimizer, range(4))
    found["around"] = (weights(model, optimizer), check_replicas(model, optimizer.transport))
    with torch.no_grad():
        if dist.get_rank() >= 2:
            local(model.hidden[0].weight).add_(1.0)
    recipes.build("distro", model, lr=0.1, transport=mesh_transport(mesh), start="broadcast")
    found["broadcast"] = ([], check_replicas(model, mesh_transport(mesh)))
    found |= _evaluated(mesh)
    return text, found


def _loss(model, step=9):
    with torch.no_grad():
        return loss_of(model, replica=0, step=step)


def _evaluated(mesh):
    """A forward pass without a backward one leaves whole weights in the outermost module."""
    model = net()
    fully_shard(model, mesh=mesh["shard"])
    _loss(model)
    # Made of shards all the same.
    optimizer = recipes.build("one_bit_muon", model, lr=0.02, transport=mesh_transport(mesh), interval=4)
    advance(model, optimizer, range(2))
    transport, own = optimizer.transport, _loss(model)
    with optimizer.shared_weights():
        shared = _loss(model)
        during = check_replicas(model, transport)
    again = _loss(model)
    optimizer.synchronize()
    return {
        "during": ([own, again, shared, _loss(net())], during),
        "after": ([_loss(model)], check_replicas(model, transport)),
    }


def around(model, transport):
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    exchange = stages.Exchange(codec=codec.parse("sign(scale=tensor)"), feedback=stages.EF14())
    options = {"outer_chain": exchange, "local": LocalSteps(interval=2), "transport": transport}
    return local_steps(inner, model=model, **options)


def test_masters_wrapped_optimizers_and_a_broadcast_are_those_of_whole_replicas():
    made = run_replicas(_others, 4)
    assert "2 replicas of 2 processes, which share its weights" in made[0][0]
    for what in made[0][1]:
        assert len({found[what][1] for _, found in made}) == 1

    def worker(rank, make):
        model, transport = net(torch.bfloat16), make()
        optimizer = build_whole("one_bit_muon", model, transport)
        advance(model, optimizer, range(3))
        optimizer.synchronize()
        masters, model = weights(model, optimizer), net()
        optimizer = around(model, transport)
        advance(model, optimizer, range(4))
        return {"masters": masters, "around": weights(model, optimizer)}

    for what, expected in run_threads(worker, replicas=2)[0].items():
        for mine, theirs in zip(made[0][1][what][0], expected, strict=True):
            assert torch.equal(mine, theirs), what
    # Evaluation sees the weights that it is to see, and training goes on with its own.
    for _, found in made:
        own, again, shared, start = found["during"][0]
        assert own == again != shared
        assert shared == start
    assert len({float(found["after"][0][0]) for _, found in made}) == 1


def _die():
    model, optimizer = build("distro", (2, 2))
    advance(model, optimizer, range(1))
    if dist.get_rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return _said(lambda: advance(model, optimizer, range(1, 3)))


def test_a_process_that_is_lost_ends_all():
    *found, lost = run_replicas(_die, 4, expect_lost=(3,))
    assert lost is None
    assert [kind for kind, _ in found] == [ReplicaLostError] * 3
    assert "replica 1" in found[2][1]
