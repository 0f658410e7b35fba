"""Sites among members that come and go: threads that act as one, and meet the others through a real lighthouse."""

import itertools
import re
import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from muonwire.errors import NonFiniteUpdateError, ReplicaLostError, StoppedError, UsageError
from muonwire.transport import digest_all, elastic_sites, run_threads
from muonwire.transport.elastic_sites import ElasticSiteTransport
from muonwire.transport.secret import Secret
from tests.optim.test_elastic import (
    LATE_MS,
    GoneError,
    Replica,
    agree,
    end,
    gradient_step,
    lighthouse,  # noqa: F401 - a fixture
    together,
)
from tests.slow import slow_unless

LOCAL = "one_bit_muon(interval=2)"
FRAGMENTS = "one_bit_muon(interval=4, fragments=2, delay=1)"
SHARED = "sign(scale=shared)"
LOSSLESS = f'one_bit_muon(interval=2, means="lossless", codec="{SHARED}", vector_codec="{SHARED}")'
RECOMPRESSED = 'one_bit_muon(interval=2, means="recompressed")'
RECIPES = (LOCAL, "muon", FRAGMENTS, LOSSLESS, RECOMPRESSED)


@dataclass
class Mate(Replica):
    """A replica of a site."""

    place: int = 0
    home: object = None

    def _make_transport(self, how):
        return ElasticSiteTransport(how, inside=self.home, secret=self.secret, run="test")

    def work(self, home):
        self.home = home
        if self.place:
            # It would wait for the leaders of other sites while its own leader waits for its turn.
            self.barrier = None
        self._run()
        if self.error is not None:
            raise self.error


@dataclass
class Site:
    """The replicas of a site in threads that take turns; all members have theirs at the same time."""

    name: str
    lighthouse: str
    recipe: str = LOCAL
    inside: int = 2
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.mates = [
            Mate(self.name, self.lighthouse, self.recipe, place=i, **self.options) for i in range(self.inside)
        ]

    @property
    def leader(self):
        return self.mates[0]

    @property
    def barrier(self):
        return self.leader.barrier

    @barrier.setter
    def barrier(self, barrier):
        self.leader.barrier = barrier

    @property
    def log(self):
        return self.leader.log

    @property
    def said(self):
        return self.leader.said

    @property
    def errors(self):
        return [mate.error for mate in self.mates]

    def start(self):
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self):
        try:
            run_threads(lambda rank, make: self.mates[rank].work(make()), replicas=self.inside)
        except BaseException as error:
            self.error = error


def site(name, lighthouse, recipe=LOCAL, *, inside=2, **options):  # noqa: F811
    return Site(name, lighthouse, recipe, inside=inside, options=options)


class ByHand(Replica):
    """A member of one replica that stands for a site of two: it averages the gradients of both slices by itself."""

    def _backward(self, step):
        parts = []
        for place in range(2):
            self.model.zero_grad()
            rank, world_size = self.transport.rank, self.transport.world_size
            gradient_step(self.model, step=step, rank=2 * rank + place, world_size=2 * world_size)
            parts.append([p.grad.clone() for p in self.model.parameters()])
        for param, first, second in zip(self.model.parameters(), *parts, strict=True):
            param.grad.copy_((first + second) / 2)


def pause(replica, seconds=0.1):
    """The replicas of a site take turns, so that one that sleeps is enough."""
    if getattr(replica, "place", 0) == 0:
        time.sleep(seconds)


def alike(*members):
    """The replicas of a site hold the same weights and states after every step, and members the same shared weights."""
    for member in members:
        if isinstance(member, Site):
            for mate in member.mates[1:]:
                assert mate.log == member.log
                assert_same(mate.optimizer.state_dict(), member.leader.optimizer.state_dict())
    agree(*members)


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    else:
        assert one == other


def counted(transport):
    """What crossed between members, without what they said when they met."""
    return {
        purpose: (t.sent_bytes, t.egress_bytes, t.received_bytes, t.num_messages)
        for purpose, t in transport.meter.by_purpose.items()
        if purpose != "control"
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_sites_are_two_members_that_see_the_mean_gradient_to_the_last_bit_and_byte(recipe, lighthouse):  # noqa: F811
    sites = together(site(n, lighthouse, recipe, steps=8) for n in ("a", "b"))
    end(*sites)
    assert [s.errors for s in sites] == [[None] * 2] * 2
    singles = together(ByHand(n, lighthouse, recipe, steps=8) for n in ("c", "d"))
    end(*singles)
    assert [s.error for s in singles] == [None] * 2
    alike(*sites)
    for of_site, single in zip(sites, singles, strict=True):
        assert [line["digest"] for line in of_site.log] == [line["digest"] for line in single.log]
        leader, mate = of_site.mates
        assert counted(leader.transport) == counted(single.transport)
        assert all(traffic == (0, 0, 0, 0) for traffic in counted(mate.transport).values())
        assert mate.transport.inside_traffic.egress_bytes > 0
        assert [m.transport.data_slice for m in of_site.mates] == [
            (2 * leader.transport.rank + place, 4) for place in (0, 1)
        ]


@pytest.mark.parametrize(
    "recipe", slow_unless(lambda index, recipe: recipe in (FRAGMENTS, RECOMPRESSED), [(r,) for r in RECIPES])
)
def test_one_that_joins_takes_over_the_state_once_and_hands_it_to_its_site(recipe, lighthouse, monkeypatch):  # noqa: F811
    monkeypatch.setattr(elastic_sites, "_PIECE_BYTES", 1000)
    enough, slices, fetched = threading.Event(), {}, []

    def call_third(replica, step):
        if step == 5:
            enough.set()
        if step > 5:
            pause(replica)
        note(replica, step)

    def note(replica, step):
        transport = replica.transport
        slices.setdefault((transport.members, step), set()).add(transport.data_slice)

    fetch = ElasticSiteTransport._fetch
    monkeypatch.setattr(
        ElasticSiteTransport,
        "_fetch",
        lambda self, content: fetched.append(self.name) or fetch(self, content),
    )
    first = together(
        [
            site("a", lighthouse, recipe, steps=30, before=call_third),
            Replica("b", lighthouse, recipe, steps=30, before=call_third),
        ]
    )
    third = site("c", lighthouse, recipe, steps=30, seed=5, begin_at=enough, before=note).start()
    end(*first, third)
    assert [*first[0].errors, first[1].error, *third.errors] == [None] * 5
    alike(*first, third)
    assert third.log[0]["step"] >= 5
    assert third.log[0]["members"] == ("a", "b", "c")
    assert fetched == ["c"]
    for mate in third.mates:
        # It brought nothing to its first synchronization, and counts once in its second.
        assert len(mate.said) == 1
        assert "took over the weights" in mate.said[0]
    assert third.leader.counted[0] == 2
    assert 3 in third.leader.counted
    assert third.log[-1]["digest"] == first[0].log[-1]["digest"] == first[1].log[-1]["digest"]
    # Every replica of every member draws a slice of its own: two of each site, and one of the member between them.
    together_ = [(step, found) for (members, step), found in slices.items() if len(members) == 3]
    assert ("a", "b") in {members for members, _ in slices}
    assert {(i, 5) for i in range(5)} in [found for _, found in together_]
    assert all(count == 5 for _, found in together_ for _, count in found)


@pytest.mark.parametrize(
    ("place", "recipe"),
    slow_unless(
        lambda index, place, recipe: recipe in (LOCAL, RECOMPRESSED) and index != 1,
        [(0, LOCAL), *((1, recipe) for recipe in RECIPES)],
    ),
)
def test_a_site_that_loses_a_replica_ends_as_a_whole_and_joins_again(place, recipe, lighthouse):  # noqa: F811
    gone, alone = threading.Event(), threading.Event()

    def go(replica, step):
        if replica.name == "b" and replica.place == place and step == 6:
            raise GoneError
        if replica.name == "a" and step > 6:
            pause(replica)
            if replica.transport.members == ("a",):
                alone.set()

    options = {"steps": 40, "min_replicas": 1}
    sites = together(site(n, lighthouse, recipe, before=go, **options) for n in ("a", "b"))
    end(sites[1])
    lost = sites[1].mates
    assert isinstance(lost[place].error, GoneError)
    assert isinstance(lost[1 - place].error, ReplicaLostError)
    text = str(lost[1 - place].error)
    assert re.match(rf"replica {1 - place} of site b lost replica {place} of its site in step \d+ ", text)
    assert "start it again with --resume" in text
    assert lost[1 - place].error.rank == place
    gone.set()
    assert alone.wait(20)
    back = site("b", lighthouse, recipe, seed=7, **options).start()
    end(sites[0], back)
    assert sites[0].errors == back.errors == [None, None]
    alike(sites[0], back)
    seen = [members for members, _ in itertools.groupby(line["members"] for line in sites[0].log)]
    assert seen == [("a", "b"), ("a",), ("a", "b")]
    assert back.log[-1] == sites[0].log[-1]
    assert [line["step"] for line in sites[0].log] == list(range(41))


@pytest.mark.parametrize(
    ("recipe", "operation"),
    slow_unless(
        lambda index, recipe, operation: (index // 2 + index) % 2 == 0,
        [(recipe, operation) for operation in (1, 2, 3, 4, 6) for recipe in (LOCAL, RECOMPRESSED)],
    ),
)
def test_one_that_dies_in_the_middle_of_an_exchange_costs_the_others_no_step(recipe, operation, lighthouse):  # noqa: F811
    """Whatever message its leader dies in."""

    def arm(replica, step):
        if replica.name == "b" and step == 6 and replica.place == 0:
            between, calls = replica.transport.between, itertools.count(1)
            carry = between.carry

            def dies(*args):
                if next(calls) == operation:
                    between._connections.abort()
                    raise GoneError
                return carry(*args)

            between.carry = dies

    sites = together(site(n, lighthouse, recipe, steps=9, before=arm) for n in ("a", "b", "c"))
    the_others_lose_no_step(sites)


def the_others_lose_no_step(sites):
    end(*sites)
    first, gone, last = sites
    assert isinstance(gone.leader.error, GoneError)
    assert isinstance(gone.mates[1].error, ReplicaLostError)
    assert first.errors == last.errors == [None, None]
    alike(first, last)
    assert [line["step"] for line in first.log] == list(range(10))
    assert first.log[-1] == last.log[-1]
    assert last.log[-1]["members"] == ("a", "c")


@pytest.mark.parametrize("recipe", slow_unless(lambda index, recipe: recipe == LOCAL, [(LOCAL,), ("muon",)]))
def test_what_all_have_is_completed_without_the_one_that_died(recipe, lighthouse):  # noqa: F811
    """b dies when all have its messages; nobody hears that from it, and the replicas of the others complete it alike."""

    def arm(replica, step):
        if replica.name == "b" and step == 6 and replica.place == 0:

            def dies():
                # The others are in their last message by now.
                time.sleep(0.2)
                replica.transport.between._connections.abort()
                raise GoneError

            replica.transport.between.settle = dies

    sites = together(site(n, lighthouse, recipe, steps=9, before=arm) for n in ("a", "b", "c"))
    the_others_lose_no_step(sites)
    # Undisturbed, all three count in step 6.
    whole = together(site(n, lighthouse, recipe, steps=6) for n in ("d", "e", "f"))
    end(*whole)
    assert sites[0].leader.at(6)["digest"] == whole[0].leader.at(6)["digest"]
    assert sites[0].leader.at(6)["members"] == ("a", "c")


def test_a_step_that_is_not_finite_on_one_replica_is_left_out_by_all(lighthouse):  # noqa: F811
    raised = []

    def poison(replica, step):
        if step == 5 and replica.name == "b" and replica.place == 1 and not raised:
            raised.append(step)
            replica.model[0].weight.register_hook(lambda g: g * float("nan"))

    sites = together(site(n, lighthouse, "muon", before=poison) for n in ("a", "b"))
    end(*sites)
    assert [type(e) for s in sites for e in s.errors] == [NonFiniteUpdateError] * 4
    alike(*sites)
    assert [s.leader.optimizer.num_steps for s in sites] == [4, 4]


def test_a_site_that_trains_something_else_leaves_as_a_whole(lighthouse):  # noqa: F811
    enough = threading.Event()

    def call(replica, step):
        if step == 5:
            enough.set()
        pause(replica, 0.05)

    secret = Secret(bytes(range(32)))
    sites = together(site(n, lighthouse, steps=30, before=call, secret=secret) for n in ("a", "b"))
    stranger = site(
        "c", lighthouse, "one_bit_muon(interval=4)", steps=30, begin_at=enough, secret=secret
    ).start()
    end(*sites, stranger)
    assert [type(e) for e in stranger.errors] == [UsageError] * 2
    assert all("trains something else" in str(e) for e in stranger.errors)
    assert [s.errors for s in sites] == [[None] * 2] * 2
    alike(*sites)


def test_a_site_that_falls_behind_follows_as_a_whole(lighthouse):  # noqa: F811
    def dawdle(replica, step):
        if replica.name == "b" and replica.place == 1 and step == 6:
            time.sleep(4 * LATE_MS / 1000)
        if step > 6:
            pause(replica)

    sites = together(site(n, lighthouse, steps=30, before=dawdle) for n in ("a", "b", "c"))
    end(*sites)
    assert [s.errors for s in sites] == [[None] * 2] * 3
    alike(*sites)
    for mate in sites[1].mates:
        assert any("took over the weights" in text for text in mate.said)
    assert sites[1].log[-1]["digest"] == sites[0].log[-1]["digest"]


def test_a_replica_that_is_asked_to_stop_ends_the_wait_of_its_site(lighthouse):  # noqa: F811
    alone = site("a", lighthouse)
    alone.start()
    time.sleep(0.7)
    assert alone.leader.transport.waits.text().startswith("waiting for more replicas (1 of at least 2")
    alone.mates[1].transport.stopping = lambda: True
    end(alone, within_s=10)
    assert [type(e) for e in alone.errors] == [StoppedError] * 2


def test_those_that_finish_stay_for_a_site_that_is_away(lighthouse):  # noqa: F811
    back = threading.Event()

    @dataclass
    class Lingering(Mate):
        def _train(self):
            super()._train()
            if self.name == "a":
                back.set()
            self.elastic.finish(linger_s=15.0)
            self.note()

    def lingering(name, **options):
        made = site(name, lighthouse)
        made.mates = [Lingering(name, lighthouse, place=i, min_replicas=1, **options) for i in (0, 1)]
        return made

    def go(replica, step):
        if replica.name == "b" and step == 9:
            raise GoneError

    sites = together([lingering("a", before=go), lingering("b", before=go)])
    end(sites[1])
    again = lingering("b", begin_at=back).start()
    end(sites[0], again)
    assert sites[0].errors == again.errors == [None, None]
    assert again.log[-1]["digest"] == sites[0].log[-1]["digest"]
    assert again.leader.optimizer.num_steps == 12
    digests = {digest_all(m.optimizer.shared()).hex() for s in (sites[0], again) for m in s.mates}
    assert len(digests) == 1
