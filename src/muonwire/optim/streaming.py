"""Streaming: fragments of the model synchronize at staggered times, and what one has sent travels while the replica goes on.

With aₜ a replica's own weights of a fragment when they are sent, a its own when the result is merged, and s the shared ones:
Δ = s − aₜ goes through the outer chain on a channel of its own; later s ← s − outer_lr · Δ̄, and a ← s + mix · (a − aₜ).

What is in flight lies in ``state[param]`` under "fragment": "index" (which one the parameter belongs to), "sent" (aₜ) and "arrived"
(Δ̄, once it is there), both empty where nothing is in flight. The groups hold under "fragments" one number a fragment: the step of
its last "sent" message, that of the last one that was merged ("synchronized"), that of the next "merge" (0: nothing is in flight)
and how many there were ("rounds"); where H changes in the run, also the steps between its last message and its next ("gaps").

Source: Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv 2501.18512.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonwire.errors import ExchangeError
from muonwire.optim.agreement import Handshake
from muonwire.optim.flights import Arrived, Flight, awaited, exchange, split
from muonwire.optim.fragments import FRAGMENTS, cut, empty_fragment, first_counts, model_order
from muonwire.optim.inside import average_buffers
from muonwire.optim.kept import FRAGMENT, MASTER, SHARED
from muonwire.optim.passes import Pass, outer_passes
from muonwire.stages.base import State
from muonwire.transport.base import Flag, Transport
from muonwire.transport.channel import Channel, Work
from muonwire.transport.digest import digest
from muonwire.transport.meter import Traffic

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer

# In "merge": in flight, and the replicas have not agreed yet when it is merged.
_OPEN = -1


class Streaming:
    """Sends and merges the fragments of one optimizer.

    Args:
        optimizer: whose ``local`` has fragments, or a delay.

    Attributes:
        channel: on which they travel; None before the first step, and where replicas come and go: there a fragment is
            exchanged and merged in the step in which it is due.
    """

    def __init__(self, optimizer: "ChainOptimizer") -> None:
        assert optimizer.local is not None
        self._optimizer = optimizer
        self._local = optimizer.local
        self.channel: Channel | None = None
        self._flights: list[Flight] = []
        self._assigned = False
        # Guards the step that this replica has reached, and what it has announced.
        self._lock = threading.Lock()
        self._reached = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the states that have arrived, and makes a channel of its own with the other replicas' copies.
        self.land()
        return {"_optimizer": self._optimizer, "_local": self._local, "_assigned": self._assigned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.channel, self._flights = None, []
        self._lock, self._reached = threading.Lock(), 0

    @property
    def fragments(self) -> range:
        """The fragments."""
        return range(self._local.fragments)

    def params(self, fragments: Sequence[int]) -> list[Tensor]:
        """The trained parameters of these fragments, in the groups' order."""
        named, states = self._optimizer.named_parameters(), self._optimizer.state
        return [p for _, p in named if states[p].get(FRAGMENT, {}).get("index") in fragments]

    def assign(self) -> None:
        """Give every trained parameter its fragment, by the model's order where there is a model, else by that of the groups.

        Raises:
            UsageError: there are fewer parameters than fragments.
        """
        named = self._optimizer.named_parameters()
        in_order = model_order([p for _, p in named], self._optimizer._model)
        indices = cut([p.numel() for p in in_order], self._local.fragments)
        for param, index in zip(in_order, indices, strict=True):
            self._optimizer.state[param][FRAGMENT] = empty_fragment(param, index=index)
        self._assigned = True

    def fresh(self, param: Tensor) -> State:
        """The state of a parameter that comes later: it belongs to the smallest fragment."""
        sizes = [sum(p.numel() for p in self.params([f])) for f in self.fragments]
        return empty_fragment(param, index=sizes.index(min(sizes)) if self._assigned else 0)

    # When a fragment is due

    @property
    def counts(self) -> dict[str, list[int]]:
        """The fragments' numbers; see the file's beginning."""
        counts: dict[str, list[int]] = self._optimizer.param_groups[0][FRAGMENTS]
        return counts

    def _set(self, fragments: Sequence[int], **values: Sequence[int] | int) -> None:
        """Set numbers of these fragments, in new lists: a state dict may hold the old ones."""
        counts = {key: list(numbers) for key, numbers in self.counts.items()}
        for key, given in values.items():
            numbers = [given] * len(fragments) if isinstance(given, int) else given
            for fragment, number in zip(fragments, numbers, strict=True):
                counts[key][fragment] = number
        self._write(counts)

    def _write(self, counts: dict[str, list[int]]) -> None:
        for group in self._optimizer.param_groups:
            group[FRAGMENTS] = counts
            group["synchronized_step"] = min(counts["synchronized"])

    def due(self, *, ahead: int = 0) -> list[int]:
        """The fragments that are sent after ``ahead`` more local steps, if those in flight are merged before."""
        step, counts = self._optimizer.num_steps + ahead, self.counts
        gaps = counts.get("gaps")
        failed = {f for flight in self._flights if flight.error for f in flight.fragments}
        return [
            f
            for f, sent in enumerate(counts["sent"])
            if not counts["merge"][f]
            and f not in failed
            and self._local.due(
                local_step=step, alone=step - sent, interval=None if gaps is None else gaps[f]
            )
        ]

    @property
    def last(self) -> int:
        """The step of the last message that was merged, of any fragment."""
        return max(self.counts["synchronized"])

    # How often, where that changes in the run

    @property
    def interval(self) -> int:
        """The present H, without growth."""
        adapting = self._optimizer.adapting
        return self._local.initial if adapting is None else adapting.now

    def _set_gaps(self, fragments: Sequence[int], steps: int) -> None:
        if "gaps" in self.counts:
            self._set(fragments, gaps=steps)

    def _note(self, arrived: Arrived) -> None:
        if self._optimizer.adapting is not None:
            self._optimizer.adapting.note(arrived.spells)

    def _begin_interval(self) -> None:
        """After the last fragment of an interval: where H changes, the distances between the fragments do from here on."""
        adapting, step, count = self._optimizer.adapting, self._optimizer.num_steps, self._local.fragments
        before = self.interval
        if adapting is None or adapting.begin() == before:
            return
        counts = self.counts
        due = [step + -(-self.interval * (f + 1) // count) for f in self.fragments]
        gaps = [at - sent for at, sent in zip(due, counts["sent"], strict=True)]
        # One that has failed is sent again in the next step.
        self._set(self.fragments, gaps=[g if old else 0 for g, old in zip(gaps, counts["gaps"], strict=True)])

    # After each local step

    def advance(self) -> None:
        """After a local step: merge what is to be merged in it, and send what is due.

        Raises:
            NonFiniteUpdateError, ExchangeError, DivergedReplicasError, ReplicaLostError, PayloadError: of the exchange whose
                result was to be merged; the shared weights and states of its fragments are what they were.
        """
        with self._lock:
            self._reached = self._optimizer.num_steps
        self._merge_ripe()
        if due := self.due():
            at_once = self._local.delay == 0 and self._local.merge == "fixed"
            if at_once:
                self._optimizer.before_exchange()
            self._send(due, keeps_own=not at_once)
            self._merge_ripe(announced=at_once)

    def _send(self, fragments: list[int], *, keeps_own: bool) -> None:
        optimizer, local, step = self._optimizer, self._local, self._optimizer.num_steps
        self.open()
        assert self.channel is not None
        transport, counts = self.channel.transport, self.counts
        flight = Flight(
            fragments=fragments,
            sent_before=[counts["sent"][f] for f in fragments],
            last=step + (self.interval - 1 if local.merge == "arrival" else local.delay),
        )
        flight.merge_at = 0 if local.merge == "arrival" else flight.last
        passes = self._passes(fragments, transport)
        if 0 in fragments:
            average_buffers(optimizer)
        # Averaged once in an interval; they change while they travel.
        buffers = [(name, b.detach().clone()) for name, b in optimizer.buffers()] if 0 in fragments else []
        handshake = self._handshake(
            step - flight.sent_before[0], buffers, closes=self.fragments[-1] in fragments
        )
        flags, problem = self._take_flags()
        number = optimizer.transport.step
        for param in self.params(fragments) if keeps_own else []:
            state = optimizer.state[param]
            state[FRAGMENT]["sent"] = optimizer.moved_weight(param).to(state[SHARED].dtype, copy=True)

        def act() -> Arrived:
            transport.step, transport.settings, transport.series = number, "", f" {fragments}"
            if transport is optimizer.transport:
                transport.requested |= flags
            else:
                transport.requested, transport.agreed = flags, Flag.NONE
            try:
                return exchange(passes, transport, handshake, buffers, problem)
            finally:
                flight.agreed = transport.agreed
                # Where the exchange has failed by itself, all raise in the same step; where the transport has, it raises again.
                with suppress(ExchangeError):
                    self._agree_on_merge(flight, transport)

        self._set(fragments, sent=step, merge=flight.merge_at or _OPEN)
        self._set_gaps(fragments, self.interval)
        if self.fragments[-1] in fragments:
            self._begin_interval()
        flight.work = self.channel.start(act)
        self._flights.append(flight)

    def _agree_on_merge(self, flight: Flight, transport: Transport) -> None:
        """Where results are merged as soon as they are there: the first step that none of the replicas has left behind."""
        if flight.merge_at:
            return
        with self._lock:
            flight.announced = min(self._reached + 1, flight.last)
        # The replicas of a site propose one step together.
        at_home = transport.gather_inside(flight.announced.to_bytes(8, "big"))
        flight.merge_at = int.from_bytes(max(transport.gather(max(at_home), purpose="agreement")), "big")

    def _passes(self, fragments: Sequence[int], transport: Transport) -> list[Pass]:
        return [
            p
            for f in fragments
            for p in outer_passes(
                self._optimizer,
                params=self.params([f]),
                transport=transport,
                step=self.counts["rounds"][f] + 1,
            )
        ]

    def _handshake(
        self, alone: int, buffers: Sequence[tuple[str, Tensor]], *, closes: bool
    ) -> Handshake | None:
        """The message before fragments; where they close an interval, with what this replica has waited in it."""
        optimizer = self._optimizer
        if optimizer.transport.world_size == 1:
            return None
        edits = optimizer.agreement.edits
        optimizer.agreement.forget_edits()
        spell = optimizer.adapting.spell() if closes and optimizer.adapting is not None else b""
        return Handshake(alone=alone, edits=edits, buffers=[digest(b) for _, b in buffers], spell=spell)

    def _take_flags(self) -> tuple[Flag, str | None]:
        """What the next message announces, and why; said once."""
        optimizer, main = self._optimizer, self._optimizer.transport
        flags = main.requested & (Flag.DIVERGED | Flag.STOP) | main.agreed & Flag.DIVERGED
        main.requested &= ~Flag.DIVERGED
        main.agreed &= ~Flag.DIVERGED
        problem, optimizer._failure = optimizer._failure, None
        return flags, problem

    # Merging

    def _merge_ripe(self, *, announced: bool = False) -> None:
        """Merge what is to be merged in this step.

        Args:
            announced: ``before_exchange`` was called already.
        """
        step = self._optimizer.num_steps
        for flight in list(self._flights):
            with self._lock:
                # A flight that has announced this step goes no further without the others' word.
                when = flight.merge_at or flight.announced or flight.last
            if when <= step:
                self._land(flight)
        ended = [f for f in self._flights if f.landed and f.merge_at <= step]
        self._flights = [f for f in self._flights if f not in ended]
        ready = [f for f, at in enumerate(self.counts["merge"]) if 0 < at <= step]
        self._end(ended, ready, announced=announced)

    def _end(self, ended: Sequence[Flight], ready: Sequence[int], *, announced: bool = False) -> None:
        """Merge the fragments that are there, and raise the error of those that failed."""
        for flight in ended:
            self._optimizer.transport.agreed |= flight.agreed & Flag.STOP
        if ready:
            self._merge(ready, announced=announced)
        for flight in ended:
            if flight.error is not None:
                raise flight.error

    @torch.no_grad()
    def _merge(self, fragments: Sequence[int], *, announced: bool) -> None:
        optimizer = self._optimizer
        if not announced:
            optimizer.before_exchange()
        means: dict[str, Tensor] = {}
        for param in self.params(fragments):
            kept = optimizer.state[param][FRAGMENT]
            if kept["arrived"].shape == param.shape:
                # One that was added to the fragment since has sent nothing.
                self._move(param, kept["arrived"], since=kept["sent"])
            means |= kept.get("buffers", {})
            optimizer.state[param][FRAGMENT] = empty_fragment(param, index=kept["index"])
        self._move_buffers(means)
        counts = self.counts
        self._set(
            fragments,
            merge=0,
            synchronized=[counts["sent"][f] for f in fragments],
            rounds=[counts["rounds"][f] + 1 for f in fragments],
        )
        self._moved()

    def _move(self, param: Tensor, update: Tensor, *, since: Tensor | None = None) -> None:
        """s ← s − outer_lr · Δ̄; a ← s + mix · (a − aₜ), with aₜ = ``since``."""
        optimizer, local = self._optimizer, self._local
        shared, own = optimizer.state[param][SHARED], optimizer.moved_weight(param)
        progress = None
        if since is not None and since.numel() and local.mix:
            progress = (own.to(shared.dtype) - since).mul_(local.mix)
        shared.add_(update.to(shared.dtype), alpha=-local.outer_lr)
        own.copy_(shared if progress is None else progress.add_(shared))
        if MASTER in optimizer.state[param]:
            param.copy_(own)

    def _move_buffers(self, means: dict[str, Tensor]) -> None:
        for name, buffer in self._optimizer.buffers() if means else []:
            if name in means:
                buffer.copy_(means[name])

    def _moved(self) -> None:
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            group["synchronizations"] += 1
        optimizer.record_weights()
        optimizer.after_exchange()

    # All fragments at once

    @torch.no_grad()
    def synchronize(self, *, only_due: bool = False) -> None:
        """Merge what is in flight, then exchange all fragments and merge them at once; the next interval begins.

        Args:
            only_due: exchange those that are due alone, if any is. Default: all.
        """
        optimizer = self._optimizer
        self.land()
        ended, self._flights = self._flights, []
        self._end(ended, [f for f, at in enumerate(self.counts["merge"]) if at])
        counts, step = self.counts, optimizer.num_steps
        due = self.due() if only_due else []
        fragments = due or [f for f, at in enumerate(counts["synchronized"]) if at < step]
        average_buffers(optimizer)
        buffers = optimizer.buffers()
        with self.direct() as transport:
            closes = not due or self.fragments[-1] in due
            handshake = self._handshake(optimizer.steps_alone, buffers, closes=closes)
            flags, problem = self._take_flags()
            transport.requested |= flags
            if fragments:
                optimizer.before_exchange()
            arrived = exchange(self._passes(fragments, transport), transport, handshake, buffers, problem)
        for param, update in arrived.updates:
            self._move(param, update)
        self._move_buffers(arrived.buffers)
        if not fragments:
            return
        self._set(fragments, rounds=[counts["rounds"][f] + 1 for f in fragments])
        self._note(arrived)
        if due:
            self._set(due, sent=step, synchronized=step)
            self._set_gaps(due, self.interval)
            if closes:
                self._begin_interval()
        else:
            interval = None if optimizer.adapting is None else optimizer.adapting.begin()
            first = first_counts(self._local, step=step, interval=interval)
            self._write({**first, "rounds": self.counts["rounds"]})
        self._moved()

    # The channel, and what is in flight

    def open(self) -> None:
        """Make the channel, if there is none and there shall be one; all replicas do it together."""
        if self.channel is None and self._optimizer.synchronizes:
            self.channel = self._optimizer.transport.channel()

    @contextmanager
    def direct(self) -> Iterator[Transport]:
        """Within the block this thread uses the transport of the channel, or the optimizer's own where there is none."""
        self.land()
        main, channel = self._optimizer.transport, self.channel
        if channel is None or channel.transport is main:
            yield main
            return
        other = channel.transport
        other.step, other.settings, other.series = main.step, "", ""
        other.requested, other.agreed = main.requested, Flag.NONE
        meter, before_s = other.meter, channel.waited_s()
        before = dict(meter.by_purpose)
        try:
            with main.waits.on(lambda: awaited(other)):
                yield other
        finally:
            main.agreed |= other.agreed
            for purpose, traffic in meter.by_purpose.items():
                main.meter.add(purpose, traffic - before.get(purpose, Traffic()))
            for name, seconds in channel.waited_s().items():
                main.meter.waited(name, seconds - before_s.get(name, 0.0))

    def land(self) -> None:
        """Wait for all that is in flight, so that the states are complete; it is merged when it is due."""
        for flight in self._flights:
            self._land(flight)

    def forget(self) -> None:
        """After other states were loaded: what this replica had in flight before is nothing any more."""
        self._flights = []

    def abandon(self) -> None:
        """After the weights were edited: what is in flight belongs to other weights, and is dropped when it has arrived."""
        self.land()
        self._flights = [f for f in self._flights if f.error]
        dropped = [f for f, at in enumerate(self.counts["merge"]) if at]
        for param in self.params(dropped):
            kept = self._optimizer.state[param][FRAGMENT]
            self._optimizer.state[param][FRAGMENT] = empty_fragment(param, index=kept["index"])
        self._set(dropped, merge=0)

    def _land(self, flight: Flight) -> None:
        if flight.landed:
            return
        assert flight.work is not None
        self._wait(flight.work)
        flight.landed = True
        states = self._optimizer.state
        try:
            arrived = flight.work.result()
        except Exception as error:
            flight.error = error
            self._set(flight.fragments, sent=flight.sent_before, merge=0)
            self._set_gaps(flight.fragments, 0)
            for param in self.params(flight.fragments):
                states[param][FRAGMENT] = empty_fragment(param, index=states[param][FRAGMENT]["index"])
            return
        for i, (param, update) in enumerate(arrived.updates):
            states[param][FRAGMENT]["arrived"] = update
            if i == 0 and arrived.buffers:
                states[param][FRAGMENT]["buffers"] = arrived.buffers
        self._set(flight.fragments, merge=flight.merge_at)
        self._note(arrived)

    def _wait(self, work: Work[Arrived]) -> None:
        """Wait for work of the channel, and count what of its time was waiting and what overlapped with this replica's own."""
        assert self.channel is not None
        main, channel = self._optimizer.transport, self.channel
        waited: dict[str, float] = {}
        since_s = time.perf_counter()
        if not work.done:
            before = channel.waited_s()
            with main.waits.on(lambda: awaited(channel.transport)):
                work.wait()
            waited = {name: s - before.get(name, 0.0) for name, s in channel.waited_s().items()}
        wait_s = time.perf_counter() - since_s
        if channel.transport is main:
            return
        if channel.at_once:
            wait_s, waited = sum(t.wait_s for t in work.traffic.values()), work.peer_s
        for purpose, traffic in work.traffic.items():
            waiting = min(traffic.wait_s, wait_s)
            wait_s -= waiting
            main.meter.add(purpose, split(traffic, waiting))
        for name, seconds in waited.items():
            main.meter.waited(name, seconds)
        for name, seconds in work.peer_s.items():
            main.meter.overlapped(name, max(seconds - waited.get(name, 0.0), 0.0))
