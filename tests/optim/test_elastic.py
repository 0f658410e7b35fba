"""Replicas that come and go, as threads that meet through a real lighthouse: what becomes of each part of a replica."""

import contextlib
import itertools
import os
import re
import threading
import time
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch.nn.utils import skip_init

from muonwire import recipes
from muonwire.errors import (
    DivergedReplicasError,
    ExchangeError,
    NonFiniteUpdateError,
    ReplicaLostError,
    StoppedError,
    UsageError,
)
from muonwire.optim.adapting import Adapting
from muonwire.optim.elastic import Elastic
from muonwire.optim.present import Present
from muonwire.transport import SingleReplica, digest_all, run_threads
from muonwire.transport.elastic import ElasticSettings, ElasticTransport
from muonwire.transport.secret import Secret
from tests.models import begin
from tests.slow import slow_unless

# Before torchft's core is loaded: it would write each quorum to standard error.
os.environ.setdefault("RUST_LOG", "error")
LATE_MS, HEARTBEAT_MS = 700, 400
LOCAL = "one_bit_muon(interval=3)"
# Where replicas come and go, a fragment is merged in the step in which it is due; one of them is in every second step.
FRAGMENTS = "one_bit_muon(interval=6, fragments=3, delay=2)"
RECORD = "one_bit_muon(interval=[(0, 3), (3, 5), (13, 2)])"
RECORD_OF_FRAGMENTS = "one_bit_muon(interval=[(0, 6), (6, 4)], fragments=3, delay=2)"


@pytest.fixture
def lighthouse():
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=1,
        join_timeout_ms=LATE_MS,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=HEARTBEAT_MS,
    )
    yield f"127.0.0.1:{server.address().rpartition(':')[2]}"
    server.shutdown()


def model_of(seed=0):
    linear = partial(skip_init, torch.nn.Linear)
    return begin(torch.nn.Sequential(linear(8, 16), torch.nn.Tanh(), linear(16, 4)), seed)


def gradient_step(model, *, step, rank, world_size):
    """The gradient of this replica's slice of the step's batch."""
    data = torch.Generator().manual_seed(step)
    inputs = torch.randn(4 * world_size, 8, generator=data)[4 * rank : 4 * (rank + 1)]
    ((model(inputs) - inputs[:, :4].sin()) ** 2).mean().backward()


def set_rates(optimizer, step):
    """A schedule: the rate of a step follows from its number."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("first_lr", group["lr"]) * (1 - step / 100)


@dataclass
class Replica:
    """A replica in a thread, and what it went through."""

    name: str
    lighthouse: str
    recipe: str = LOCAL
    steps: int = 12
    min_replicas: int = 2
    seed: int = 0
    lr: float = 0.02
    timeout_s: float = 3.0
    patience_s: float = 20.0
    secret: Secret | None = None
    barrier: threading.Barrier | None = None
    # Called before a step with the replica and the number of the step; may raise GoneError.
    before: object = None
    begin_at: threading.Event | None = None
    log: list[dict] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    error: BaseException | None = None
    # Of each exchange of updates: how many replicas counted.
    counted: list[int] = field(default_factory=list)

    def start(self):
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self):
        try:
            if self.begin_at is not None:
                assert self.begin_at.wait(30)
            self._train()
        except BaseException as error:
            self.error = error
        finally:
            if getattr(self, "transport", None) is not None:
                self.transport.close()

    def _train(self):
        torch.set_num_threads(1)
        how = ElasticSettings(
            lighthouse=self.lighthouse,
            min_replicas=self.min_replicas,
            name=self.name,
            timeout_s=self.timeout_s,
            patience_s=self.patience_s,
        )
        self.transport = transport = self._make_transport(how)
        gather = transport.gather

        def counting(payload, *, purpose="update", **observers):
            payloads = gather(payload, purpose=purpose, **observers)
            if purpose == "update" and not observers:
                self.counted.append(len(payloads))
            return payloads

        transport.gather = counting
        all_to_all = transport.all_to_all

        def counting_parts(payloads, *, purpose="update"):
            received = all_to_all(payloads, purpose=purpose)
            self.counted.append(len(received))
            return received

        transport.all_to_all = counting_parts
        # Of a site, its leader's way to the others.
        frames = getattr(transport, "between", transport)
        if frames is not None:
            mean_of = frames._mean_of

            def counting_mean(theirs, own, ranks):
                self.counted.append(len(ranks))
                return mean_of(theirs, own, ranks)

            frames._mean_of = counting_mean
        self.model = model_of(self.seed)
        name, options = recipes.parse_recipe(self.recipe)
        self.optimizer = recipes.build(name, self.model, lr=self.lr, transport=transport, **options)
        self.elastic = Elastic(self.optimizer, model=self.model)
        self.elastic.say = self.said.append
        if self.barrier is not None:
            # All have told the lighthouse that they live; it waits for those.
            self.barrier.wait(30)
            time.sleep(0.15)
        self._join()
        self.note()
        while self.optimizer.num_steps < self.steps:
            step = self.optimizer.num_steps + 1
            if self.before is not None:
                self.before(self, step)
            set_rates(self.optimizer, step)
            self._backward(step)
            self.elastic.step()
            self.optimizer.zero_grad()
            self.note()
        self.elastic.synchronize()

    def _make_transport(self, how):
        return ElasticTransport(how, secret=self.secret, run="test")

    def _join(self):
        self.elastic.join()

    def _backward(self, step):
        rank, world_size = self.transport.data_slice
        gradient_step(self.model, step=step, rank=rank, world_size=world_size)

    def note(self):
        self.log.append(
            {
                "step": self.optimizer.num_steps,
                "commits": self.transport.commits,
                "members": self.transport.members,
                "digest": digest_all(self.optimizer.shared()).hex(),
                "epoch": self.transport.epoch,
            }
        )

    def at(self, step):
        return next(line for line in self.log if line["step"] == step)

    def residuals(self):
        return [
            value
            for state in self.optimizer.state.values()
            for key, value in leaves(state)
            if key.endswith("residual")
        ]


def leaves(state, path=""):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


class GoneError(Exception):
    """What a replica that is to disappear raises."""


def together(replicas):
    """Start replicas that meet at the beginning, however long each takes to get there."""
    replicas = list(replicas)
    barrier = threading.Barrier(len(replicas))
    for replica in replicas:
        replica.barrier = barrier
    return [replica.start() for replica in replicas]


def end(*replicas, within_s=60):
    deadline = time.monotonic() + within_s
    for replica in replicas:
        replica.thread.join(max(0.1, deadline - time.monotonic()))
        assert not replica.thread.is_alive(), f"{replica.name} hangs: {replica.log[-1:]} {replica.said}"


def agree(*replicas):
    """After every step that two replicas both saw, their shared weights were the same."""
    seen = {}
    for replica in replicas:
        for line in replica.log:
            # A replica that joined notes the step in the middle of the others' interval.
            known = seen.setdefault((line["commits"], line["step"]), line["digest"])
            assert known == line["digest"], (replica.name, line)


def fixed_digest(recipe, *, steps):
    """The weights that three fixed replicas come to."""

    def fixed(rank, exchange):
        model = model_of()
        name, options = recipes.parse_recipe(recipe)
        # Replicas that come and go merge a fragment in the step in which it is due.
        options.pop("delay", None)
        optimizer = recipes.build(name, model, lr=0.02, transport=exchange(), **options)
        for step in range(1, steps + 1):
            set_rates(optimizer, step)
            gradient_step(model, step=step, rank=rank, world_size=3)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
        return digest_all(optimizer.shared()).hex()

    (wanted,) = set(run_threads(fixed, replicas=3))
    return wanted


@pytest.mark.parametrize("recipe", [LOCAL, "muon", FRAGMENTS, RECORD, RECORD_OF_FRAGMENTS])
def test_without_faults_the_outcome_is_that_of_fixed_replicas(recipe, lighthouse):
    replicas = together(Replica(n, lighthouse, recipe, min_replicas=3) for n in ("a", "b", "c"))
    end(*replicas)
    assert [r.error for r in replicas] == [None] * 3

    wanted = fixed_digest(recipe, steps=12)
    assert {digest_all(r.optimizer.shared()).hex() for r in replicas} == {wanted}
    assert {r.transport.members for r in replicas} == {("a", "b", "c")}
    assert all(n == 3 for r in replicas for n in r.counted)


@pytest.mark.parametrize(
    "recipe", slow_unless(lambda index, recipe: recipe == FRAGMENTS, [(LOCAL,), ("muon",), (FRAGMENTS,)])
)
def test_one_that_joins_takes_over_the_state_and_counts_from_its_second_synchronization(recipe, lighthouse):
    enough = threading.Event()

    def call_third(replica, step):
        if step == 7:
            enough.set()
        if step > 7:
            # The third takes a while to come.
            time.sleep(0.1)

    residuals_after_joining = []

    def look(replica, step):
        if not residuals_after_joining:
            residuals_after_joining.extend(r.clone() for r in replica.residuals())

    first = together(Replica(n, lighthouse, recipe, steps=40, before=call_third) for n in ("a", "b"))
    third = Replica("c", lighthouse, recipe, steps=40, seed=5, begin_at=enough, before=look).start()
    end(*first, third)
    assert [r.error for r in (*first, third)] == [None] * 3
    agree(*first, third)
    joined = third.log[0]
    assert joined["step"] >= 7
    assert joined["members"] == ("a", "b", "c")
    # Its own random start is gone: it has the others' weights, and brought nothing to its first synchronization.
    assert third.counted[0] == 2
    assert third.counted[1] == 3
    assert all(not r.any() for r in residuals_after_joining)
    assert bool(residuals_after_joining) == (recipe != "muon")
    assert "took over the weights" in third.said[0]
    # The learning rate and the data follow from the step and the rank that it took over.
    assert third.optimizer.num_steps == 40
    assert [r.transport.rank for r in (*first, third)] == [0, 1, 2]
    assert {tuple(g["lr"] for g in r.optimizer.param_groups) for r in (*first, third)} == {
        tuple(g["first_lr"] * 0.6 for g in third.optimizer.param_groups)
    }
    assert third.log[-1]["digest"] == first[0].log[-1]["digest"]


@pytest.mark.parametrize("options", slow_unless(lambda index, options: options, [("",), (", fragments=3",)]))
def test_an_interval_that_follows_the_link_goes_on_with_one_that_joins(options, lighthouse, monkeypatch):
    """A step takes a second, and a synchronization as long of waiting, by a clock that follows from what was done."""

    def measure(adapting):
        counts = adapting._optimizer.param_groups[0]
        waited_s = float(counts["synchronizations"])
        return counts["step"] + waited_s, waited_s

    monkeypatch.setattr(Adapting, "_measure", measure)
    enough = threading.Event()

    def call_third(replica, step):
        if step == 16:
            enough.set()
        if step > 16:
            time.sleep(0.05)

    recipe = f"one_bit_muon(interval='auto', share=0.5, intervals=(3, 6){options})"
    first = together(Replica(n, lighthouse, recipe, steps=50, before=call_third) for n in ("a", "b"))
    third = Replica("c", lighthouse, recipe, steps=50, seed=5, begin_at=enough).start()
    end(*first, third)
    assert [r.error for r in (*first, third)] == [None] * 3
    agree(*first, third)
    one, *others = [r.optimizer.param_groups[0]["intervals"] for r in (*first, third)]
    assert others == [one, one]
    # From 6, the bound that is nearest to 11. Of three fragments each is waited for.
    assert one["intervals"] == ([6, 4] if options else [6, 4, 3])
    assert third.log[0]["step"] < one["steps"][1]
    assert third.counted[0] == 2


def test_under_a_secret_a_replica_joins_and_another_dies(lighthouse):
    """The sealed streams begin anew in each quorum, and the state that is handed over has a tag."""
    secret, enough = Secret(bytes(range(32))), threading.Event()

    def act(replica, step):
        if step == 6:
            enough.set()
        if step > 6:
            time.sleep(0.1)
        if replica.name == "b" and "c" in replica.transport.members:
            raise GoneError

    first = together(Replica(n, lighthouse, steps=40, before=act, secret=secret) for n in ("a", "b"))
    third = Replica("c", lighthouse, steps=40, begin_at=enough, before=act, secret=secret).start()
    end(*first, third)
    assert isinstance(first[1].error, GoneError)
    assert [first[0].error, third.error] == [None, None]
    agree(*first, third)
    assert third.log[-1] == first[0].log[-1]
    assert third.log[-1]["members"] == ("a", "c")
    assert first[0].transport.refused_in_all.total() == 0


def test_a_state_that_was_altered_on_its_way_is_not_taken(lighthouse):
    transport = ElasticTransport(
        ElasticSettings(lighthouse=lighthouse, name="a"), secret=Secret(bytes(range(32)))
    )
    try:
        taken = []
        transport.give_state, transport.take_state = lambda: {"weight": torch.ones(3)}, taken.append
        sent = transport._give()
        transport._take(sent)
        assert taken[0]["weight"].tolist() == [1, 1, 1]
        for altered in (
            {**sent, "state": sent["state"].clone().index_fill_(0, torch.tensor([200]), 7)},
            {**sent, "tag": "00" * 16},
        ):
            with pytest.raises(ExchangeError, match="was altered, or comes from somebody without the secret"):
                transport._take(altered)
        assert len(taken) == 1
        # A tag holds for one quorum.
        transport._connections.epoch += 1
        with pytest.raises(ExchangeError):
            transport._take(sent)
    finally:
        transport.close()


@pytest.mark.parametrize(
    "recipe", slow_unless(lambda index, recipe: recipe == FRAGMENTS, [(LOCAL,), ("muon",), (FRAGMENTS,)])
)
def test_one_that_leaves_is_left_out_of_the_next_synchronization(recipe, lighthouse):
    def go(replica, step):
        if replica.name == "b" and step == 8:
            raise GoneError

    replicas = together(Replica(n, lighthouse, recipe, before=go) for n in ("a", "b", "c"))
    end(*replicas)
    left = replicas[1]
    assert isinstance(left.error, GoneError)
    assert [r.error for r in replicas if r is not left] == [None, None]
    agree(*replicas)
    for stayed in (replicas[0], replicas[2]):
        assert stayed.at(6)["members"] == ("a", "b", "c")
        assert stayed.log[-1]["members"] == ("a", "c")
        assert stayed.counted[-1] == 2
    assert [r.transport.rank for r in replicas if r is not left] == [0, 1]


@pytest.mark.parametrize(
    ("recipe", "operation"),
    slow_unless(
        lambda index, recipe, operation: (index + operation) % 3 == 0,
        [(recipe, operation) for operation in (1, 2, 3, 4) for recipe in (LOCAL, "muon", FRAGMENTS)],
    ),
)
def test_one_that_dies_in_the_middle_of_an_exchange_costs_the_others_no_step(recipe, operation, lighthouse):
    """Whatever message it dies in: the others repeat the synchronization with those that are there."""

    def arm(replica, step):
        if replica.name == "b" and step == 6:
            carry, calls = replica.transport.carry, []

            def dies(*args):
                calls.append(1)
                if len(calls) == operation:
                    replica.transport._connections.abort()
                    raise GoneError
                return carry(*args)

            replica.transport.carry = dies

    replicas = together(Replica(n, lighthouse, recipe, before=arm) for n in ("a", "b", "c"))
    end(*replicas)
    assert isinstance(replicas[1].error, GoneError)
    stayed = [replicas[0], replicas[2]]
    assert [r.error for r in stayed] == [None, None]
    agree(*replicas)
    assert {r.log[-1]["members"] for r in stayed} == {("a", "c")}
    assert {r.log[-1]["step"] for r in stayed} == {12}
    assert stayed[0].log[-1]["digest"] == stayed[1].log[-1]["digest"]
    # No step was counted twice.
    assert [line["step"] for line in stayed[0].log] == list(range(13))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LOCAL, "muon", FRAGMENTS])
def test_one_that_fell_behind_brings_nothing_though_the_first_attempt_fails(recipe, lighthouse):
    """It has taken over the others' state when they must meet again: its own gradient was of other weights."""
    dropped = []

    def fail_once(replica, step):
        if replica.name == "b" and step == 6:
            time.sleep(4 * LATE_MS / 1000)
            observe = replica.elastic._observe

            def lost():
                if not dropped:
                    dropped.append(replica.elastic._taken)
                    raise ReplicaLostError("a message is lost")
                observe()

            replica.elastic._observe = lost
        if step > 6:
            time.sleep(0.15)

    replicas = together(Replica(n, lighthouse, recipe, steps=40, before=fail_once) for n in ("a", "b", "c"))
    end(*replicas)
    assert [r.error for r in replicas] == [None] * 3
    assert dropped == [True]
    agree(*replicas)
    behind = replicas[1]
    fallen = behind.said.index(next(text for text in behind.said if "took over" in text))
    assert len(behind.said) == fallen + 1
    assert {r.log[-1]["digest"] for r in replicas} == {behind.log[-1]["digest"]}
    # Before: three; while it was away and in the synchronization of its return: two.
    counts = replicas[0].counted
    assert counts[0] == 3
    assert 2 in counts
    assert counts[-1] == 3


@pytest.mark.parametrize("recipe", slow_unless(lambda index, recipe: recipe == LOCAL, [(LOCAL,), ("muon",)]))
def test_what_one_has_committed_the_others_complete_without_it(recipe, lighthouse):
    """c dies when all have its messages; a has heard so from all and moves its weights, b and d have not, and a is away then."""
    moved = threading.Event()

    def arm(replica, step):
        if step != 6:
            return
        transport, settle = replica.transport, replica.transport.settle
        if replica.name == "c":

            def dies():
                # The others are in their last message by now.
                time.sleep(0.2)
                transport._connections.abort()
                raise GoneError

            transport.settle = dies
        elif replica.name == "a":

            def hears_all():
                transport.settle = settle
                # It has heard from c, too, which then died.
                with contextlib.suppress(ReplicaLostError):
                    settle()
                transport._failure = None
                moved.set()

            transport.settle = hears_all
        replica.armed = True

    def act(replica, step):
        arm(replica, step)
        if replica.name == "a" and moved.is_set() and not replica.waited:
            replica.waited = True
            # Until the others have gone on without it.
            time.sleep(4 * LATE_MS / 1000)
        if step > 6:
            time.sleep(0.1)

    replicas = [Replica(n, lighthouse, recipe, steps=40, before=act) for n in ("a", "b", "c", "d")]
    for replica in replicas:
        replica.waited = False
    end(*together(replicas))
    first, second, gone, fourth = replicas
    assert isinstance(gone.error, GoneError)
    assert [r.error for r in (first, second, fourth)] == [None] * 3
    assert moved.is_set()
    agree(*replicas)
    # All four counted in what b and d completed by themselves: step 6 of theirs is that of a.
    assert first.at(6)["digest"] == second.at(6)["digest"] == fourth.at(6)["digest"]
    assert any(line["members"] == ("b", "d") for line in second.log)
    assert first.log[-1]["digest"] == second.log[-1]["digest"] == fourth.log[-1]["digest"]


def test_one_that_stands_elsewhere_takes_over_the_others_state(lighthouse):
    """The same weights, and another number of steps: it does not end the run."""

    def stray(replica, step):
        if replica.name == "b" and step == 7:
            replica.optimizer._gradients.count += 3
            replica.transport.epoch -= 1
        if replica.name != "b" and step == 7:
            replica.transport.epoch -= 1

    replicas = together(Replica(n, lighthouse, "muon", before=stray) for n in ("a", "b", "c"))
    end(*replicas)
    assert [r.error for r in replicas] == [None] * 3
    agree(*replicas)
    assert any("took over the weights of step 6" in text for text in replicas[1].said)
    assert {r.log[-1]["step"] for r in replicas} == {12}


def test_one_that_is_late_is_waited_for_no_longer_than_stated_and_follows(lighthouse):
    waited = []

    def dawdle(replica, step):
        if replica.name == "b" and step == 6:
            time.sleep(4 * LATE_MS / 1000)
        if replica.name == "a" and step == 7:
            waited.append(time.monotonic())
        if replica.name == "a" and step == 6:
            waited.append(time.monotonic())
        if step > 6:
            time.sleep(0.15)

    replicas = together(Replica(n, lighthouse, steps=40, before=dawdle) for n in ("a", "b", "c"))
    end(*replicas)
    assert [r.error for r in replicas] == [None] * 3
    agree(*replicas)
    late = replicas[1]
    began_s, ended_s = waited[:2]
    assert ended_s - began_s < 2.5 * LATE_MS / 1000
    assert any(line["members"] == ("a", "c") for line in replicas[0].log)
    assert any("3 local steps since its last synchronization are lost" in text for text in late.said), (
        late.said
    )
    assert late.log[-1]["digest"] == replicas[0].log[-1]["digest"]
    # It jumped over the steps that the others took meanwhile.
    steps = [line["step"] for line in late.log]
    assert max(b - a for a, b in itertools.pairwise(steps)) > 3


@pytest.mark.parametrize(
    "secret",
    slow_unless(
        lambda index, secret: secret,
        [(None,), (Secret(bytes(range(32))),)],
        ids=lambda secret: "sealed" if secret else "open",
    ),
)
def test_a_stranger_leaves_with_an_error_and_the_others_go_on(lighthouse, secret):
    enough = threading.Event()

    def call(replica, step):
        if step == 5:
            enough.set()
        time.sleep(0.05)

    replicas = together(Replica(n, lighthouse, steps=40, before=call, secret=secret) for n in ("a", "b"))
    stranger = Replica(
        "c", lighthouse, "one_bit_muon(interval=4)", steps=40, begin_at=enough, secret=secret
    ).start()
    end(*replicas, stranger)
    assert isinstance(stranger.error, UsageError)
    assert "trains something else" in str(stranger.error)
    assert [r.error for r in replicas] == [None, None]
    agree(*replicas)
    assert replicas[0].log[-1]["step"] == 40


def test_replicas_with_different_first_weights_all_get_the_error(lighthouse):
    replicas = together(Replica(n, lighthouse, seed=s) for n, s in (("a", 0), ("b", 1)))
    end(*replicas)
    for replica in replicas:
        assert isinstance(replica.error, DivergedReplicasError), replica.error
        assert "do not start from the same weights: b" in str(replica.error)


def test_too_few_are_waited_for_as_long_as_stated(lighthouse):
    alone = Replica("a", lighthouse, patience_s=2.0).start()
    time.sleep(1.5)
    # One wait, however often it asks, so that a watcher tells of it.
    assert re.fullmatch(
        r"waiting for more replicas \(1 of at least 2 replicas are there\) for [12] s",
        alone.transport.waits.text(),
    )
    end(alone)
    assert isinstance(alone.error, ExchangeError)
    assert "waited 2 s for other replicas" in str(alone.error)
    assert "1 of at least 2 replicas are there" in str(alone.error)


def test_a_step_that_is_not_finite_is_left_out_by_all(lighthouse):
    raised = []

    def poison(replica, step):
        if step == 5 and not raised:
            raised.append(step)
            replica.model[0].weight.register_hook(lambda g: g * float("nan"))

    replicas = together(Replica(n, lighthouse, "muon", before=poison) for n in ("a", "b"))
    end(*replicas)
    assert [type(r.error) for r in replicas] == [NonFiniteUpdateError] * 2
    agree(*replicas)
    assert [r.optimizer.num_steps for r in replicas] == [4, 4]


def test_those_that_finish_stay_for_one_that_is_away(lighthouse):
    back = threading.Event()

    class Lingering(Replica):
        def _train(self):
            super()._train()
            if self.name != "b":
                back.set()
            self.elastic.finish(linger_s=15.0)
            self.note()

    def go(replica, step):
        if step == 9 and replica.name == "b":
            raise GoneError

    replicas = together(Lingering(n, lighthouse, before=go) for n in ("a", "b", "c"))
    end(replicas[1])
    again = Lingering("b", lighthouse, begin_at=back).start()
    began_s = time.monotonic()
    end(replicas[0], replicas[2], again)
    assert time.monotonic() - began_s < 14
    assert again.error is None
    assert again.optimizer.num_steps == 12
    assert {r.log[-1]["digest"] for r in (replicas[0], replicas[2], again)} == {again.log[-1]["digest"]}
    assert any("away are b" in text for text in replicas[0].said)


def test_all_that_come_back_with_other_numbers_of_local_steps_go_on_from_the_last_synchronization(lighthouse):
    """After a power cut: each has a checkpoint of its own, of the same synchronization."""

    class Restored(Replica):
        def _join(self):
            # What its checkpoint holds: one or two local steps.
            self.optimizer.synchronizes = False
            for step in range(1, {"a": 1, "b": 2}[self.name] + 1):
                gradient_step(self.model, step=step, rank=0, world_size=1)
                self.optimizer.step()
                self.optimizer.zero_grad()
            super()._join()

    replicas = together(Restored(n, lighthouse) for n in ("a", "b"))
    end(*replicas)
    assert [r.error for r in replicas] == [None, None]
    assert [r.log[0]["step"] for r in replicas] == [0, 0]
    assert all("different numbers of local steps" in r.said[0] for r in replicas)
    agree(*replicas)
    assert replicas[0].log[-1] == replicas[1].log[-1]


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("approach_b(server=True)", "serve: the state of a tensor is lost with its owner"),
    ],
)
def test_recipes_that_need_the_same_replicas_are_refused(recipe, why, lighthouse):
    transport = ElasticTransport(ElasticSettings(lighthouse=lighthouse, name="a"))
    try:
        name, options = recipes.parse_recipe(recipe)
        optimizer = recipes.build(name, model_of(), lr=0.02, transport=transport, **options)
        with pytest.raises(UsageError, match=why):
            Elastic(optimizer)
    finally:
        transport.close()


def test_another_transport_is_refused():
    optimizer = recipes.build("muon", model_of(), lr=0.02, transport=SingleReplica())
    with pytest.raises(UsageError, match="build the optimizer with an ElasticTransport"):
        Elastic(optimizer)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"name": "a"}', b"\xff"])
def test_a_replica_that_says_nothing_of_the_kind_is_an_error(text):
    with pytest.raises(ExchangeError, match="replica 3 does not say who it is"):
        Present.read(text, rank=3)


def test_errors_of_a_replica_are_its_own(lighthouse):
    """A stop while it waits ends the wait."""
    alone = Replica("a", lighthouse)
    alone.start()
    time.sleep(0.5)
    alone.transport.stopping = lambda: True
    end(alone, within_s=30)
    assert isinstance(alone.error, StoppedError)
    assert not isinstance(alone.error, ReplicaLostError)


def test_a_lighthouse_that_is_started_again_is_found_again(free_port):
    """Nobody synchronizes while it is away; nothing is lost."""
    from torchft.coordination import LighthouseServer

    def serve():
        return LighthouseServer(
            bind=f"127.0.0.1:{free_port}",
            min_replicas=1,
            join_timeout_ms=LATE_MS,
            quorum_tick_ms=20,
            heartbeat_timeout_ms=HEARTBEAT_MS,
        )

    servers = [serve()]
    once = threading.Event()

    def restart(replica, step):
        if step == 5 and replica.name == "a" and not once.is_set():
            once.set()
            servers.pop().shutdown()
            time.sleep(1.0)
            servers.append(serve())

    replicas = together(Replica(n, f"127.0.0.1:{free_port}", before=restart) for n in ("a", "b"))
    end(*replicas)
    servers.pop().shutdown()
    assert [r.error for r in replicas] == [None, None]
    agree(*replicas)
    assert [line["step"] for line in replicas[0].log] == list(range(13))
