"""What is measured: the processor's part of an exchange, steps of a task, and the link between real processes."""

from types import SimpleNamespace

import pytest
import torch

from muonwire.codec import Pipeline
from muonwire.plan import machine as machine_room
from muonwire.plan import processor
from muonwire.plan.exchanges import exchanged
from muonwire.plan.machine import as_told, measure_rates, measured
from muonwire.plan.model import read_model
from muonwire.plan.processor import cost_of
from muonwire.tasks import TextSettings
from muonwire.transport import ProcessGroupTransport, SingleReplica
from tests.replicas import run_replicas

SHARED = "sign(scale=shared)"
RECIPES = ("muon", "one_bit_muon(interval=5)", "demo")


@pytest.fixture
def slow_codecs(monkeypatch):
    """On a clock that nothing else moves, a large tensor takes 20 s to encode, and 3 s to decode for each replica."""
    now_s = [0.0]
    encode, decode = Pipeline.encode_body, Pipeline.bounded_mean

    def slow_encode(self, tensor, **rest):
        now_s[0] += 20.0 if tensor.numel() > 1000 else 0.5
        return encode(self, tensor, **rest)

    def slow_decode(self, bodies, shape, **rest):
        now_s[0] += 3.0 * len(bodies) if shape[0] > 100 else 0.0
        return decode(self, bodies, shape, **rest)

    monkeypatch.setattr(Pipeline, "encode_body", slow_encode)
    monkeypatch.setattr(Pipeline, "bounded_mean", slow_decode)
    monkeypatch.setattr(processor, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))


@pytest.mark.parametrize("recipe", ["one_bit_muon", "distro"])
@pytest.mark.parametrize("replicas", [2, 4])
def test_encoding_and_every_replica_s_decoding_count(slow_codecs, replicas, recipe):
    what = exchanged(recipe, read_model("1e6").module)
    cost = cost_of(what, replicas=replicas, largest_numel=128 * 128)
    large_s, small_s = 20.0 + 3.0 * replicas, 0.5
    assert cost.seconds([torch.empty(128, 128)]) == pytest.approx(large_s)
    assert cost.seconds([torch.empty(16, 16)] * 7) == pytest.approx(7 * small_s)
    # Linear in the entries, and in the tensors.
    per_entry_s = (large_s - small_s) / (128 * 128 - 16 * 16)
    assert cost.seconds([torch.empty(256, 128)]) == pytest.approx(large_s + 128 * 128 * per_entry_s)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_owners_decode_their_parts_and_every_mean(monkeypatch, replicas):
    """A sample has a tensor for each owner: a replica encodes all and the mean of its own, and decodes R of its own and R means."""
    now_s = [0.0]
    encode, decode, mean_of = Pipeline.encode_body, Pipeline.decode_body, Pipeline.bounded_mean

    def counted(kind, numel):
        now_s[0] += {"encode": 20.0, "decode": 3.0}[kind] * numel / 64**2

    def slow_encode(self, tensor, **rest):
        counted("encode", tensor.numel())
        return encode(self, tensor, **rest)

    def slow_decode(self, body, shape, **rest):
        counted("decode", torch.Size(shape).numel())
        return decode(self, body, shape, **rest)

    def slow_mean(self, bodies, shape, **rest):
        for _ in bodies:
            counted("decode", torch.Size(shape).numel())
        return mean_of(self, bodies, shape, **rest)

    monkeypatch.setattr(Pipeline, "encode_body", slow_encode)
    monkeypatch.setattr(Pipeline, "decode_body", slow_decode)
    monkeypatch.setattr(Pipeline, "bounded_mean", slow_mean)
    monkeypatch.setattr(processor, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    what = exchanged("one_bit_muon(means='recompressed')", read_model("1e6").module)
    cost = cost_of(what, replicas=replicas, largest_numel=64 * 64)
    once_s = 20.0 * (replicas + 1) + 3.0 * 2 * replicas
    assert cost.seconds([torch.empty(64, 64)]) == pytest.approx(once_s / replicas)


@pytest.mark.parametrize(
    "recipe",
    [
        f"one_bit_muon(means='lossless', codec='{SHARED}', vector_codec='{SHARED}')",
        "one_bit_muon(means='recompressed', fragments=4, delay=2, growth=0.1)",
        "sparseloco(means='recompressed')",
        "ef14_muon(means='recompressed')",
        "signmuon(means='lossless')",
    ],
)
@pytest.mark.parametrize("replicas", [2, 5, 16])
def test_every_form_of_means_is_timed(recipe, replicas):
    cost = cost_of(exchanged(recipe, read_model("1e6").module), replicas=replicas, largest_numel=64 * 64)
    assert cost.seconds([torch.empty(64, 64)]) > 0


def test_a_dense_mean_takes_no_time_of_the_processor():
    cost = cost_of(exchanged("muon", read_model("pico").module), replicas=4, largest_numel=1000)
    assert cost.seconds([torch.empty(9, 9)]) == 0.0


def test_a_told_step_has_the_optimizer_in_it():
    what = exchanged("one_bit_muon", read_model("pico").module)
    machine = as_told(0.25, [what], replicas=3)
    assert machine.step_s(what) == 0.25
    assert machine.exchange_s(what) > 0


def briefly(set_to):
    """Measure for a fraction of the time: what is found is not judged by its accuracy."""
    set_to(machine_room, "STEPS_S", 0.3)
    set_to(machine_room, "LARGEST_BYTES", 1 << 20)


def measure():
    briefly(setattr)
    torch.manual_seed(0)
    task = TextSettings(model_size="pico", batch=2).make()
    what = [exchanged(recipe, read_model("pico").module) for recipe in RECIPES]
    transport = ProcessGroupTransport()
    machine = measured(task, what, transport, replicas=transport.world_size)
    return machine, transport.meter.training.num_messages


def test_replicas_measure_together_and_agree():
    (machine, trained), (other, _) = run_replicas(measure, 2)
    assert machine == other
    assert trained == 0
    assert machine.rates.up_mbit_s > 0
    assert machine.rates.goodput
    assert machine.rates.latency_s > 0
    assert machine.compute_s > 0
    assert sorted(machine.optimizer_s) == ["plain", "polar"]
    assert min(machine.optimizer_s.values()) > 0


@pytest.mark.parametrize(
    ("up", "down", "together", "found"),
    [
        # The slowest replica's rate counts, each way.
        ((16, 8, 16), (40, 30, 40), 8, (8, 24)),
        # All at once are slower than each alone: they share something.
        ((16, 16, 16), (20, 20, 20), 10, (10, 20)),
        ((50, 50, 50), (10, 12, 14), 6, (50, 6)),
    ],
)
def test_rates_are_those_of_the_slowest_replica_and_of_all_at_once(monkeypatch, up, down, together, found):
    """Replica 0 of three, whose link answers by these rates; what a hub receives comes through the others' rates up."""
    peers, latency_s = [1, 2], 0.05

    def timed(transport, receivers, senders, num_bytes):
        if receivers and senders:
            rate = together
        elif receivers == peers or len(senders) == 1:
            hub = 0 if receivers else senders[0]
            rate = up[hub]
        else:
            hub = 0 if senders else receivers[0]
            rate = min(down[hub], 2 * 1.5 * min(up))
        return latency_s + 8e-6 * num_bytes * len(peers) / rate

    monkeypatch.setattr(machine_room, "_timed", timed)
    monkeypatch.setattr(machine_room, "_ping", lambda transport: latency_s)
    rates = measure_rates(SimpleNamespace(rank=0, world_size=3, peers=peers))
    assert (rates.up_mbit_s, rates.down_mbit_s) == pytest.approx(found)
    assert rates.latency_s == latency_s
    assert rates.goodput


def test_one_replica_alone_measures_its_steps_and_no_link(monkeypatch):
    briefly(monkeypatch.setattr)
    task = TextSettings(model_size="pico", batch=2).make()
    what = exchanged("adamw", read_model("pico").module)
    machine = measured(task, [what], SingleReplica(), replicas=4)
    assert machine.rates is None
    assert machine.step_s(what) > machine.compute_s > 0
