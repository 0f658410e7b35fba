"""Elastic: steps an optimizer with whichever replicas are there.

What a replica has, and what becomes of it:

| | a replica dies or leaves | it joins, or comes back | it came late, and the others went on without it |
|---|---|---|---|
| shared weights, outer state, counters | the others have them | from one that is up to date | from one that is up to date |
| what it had not sent (residual), local optimizer state | lost | starts empty | emptied |
| its local steps since the last synchronization | lost, at most one interval | none | lost, at most one interval |
| its first synchronization | | brings nothing, takes the others' outcome | the same |
| mean | over those that trained, each counts once | does not count in its first | does not count |
| data | slice of its rank among those present | the same | the same |
| learning rate | of the step that all share | the same | the same |

After a synchronization that failed for some, those that lack it take over the state of those that have it.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from muonwire.errors import (
    DivergedReplicasError,
    ExchangeError,
    NonFiniteUpdateError,
    PayloadError,
    ReplicaLostError,
    StoppedError,
    UsageError,
)
from muonwire.optim.agreement import ensure_agreement
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.exchanging import exchange
from muonwire.optim.groups import description as describe_groups
from muonwire.optim.groups import rates
from muonwire.optim.passes import inner_passes
from muonwire.optim.present import Present
from muonwire.optim.sharing import load_shared, shared_part
from muonwire.stages.base import Stage
from muonwire.transport.digest import digest_all
from muonwire.transport.members import MembersTransport

# Synchronizations in a row that may fail for another reason than a replica that was lost.
ATTEMPTS = 3
_LINGER_PAUSE_S = 0.5


class Elastic:
    """Steps an optimizer with whichever replicas are there; use its ``step`` in place of the optimizer's.

        transport = ElasticTransport(ElasticSettings(lighthouse="10.0.0.1:29510"))
        optimizer = recipes.one_bit_muon(model, lr=0.01, transport=transport)
        elastic = Elastic(optimizer, model=model)
        elastic.join()
        while optimizer.num_steps < 1000:
            number, count = transport.data_slice
            batch = draw(step=optimizer.num_steps + 1, rank=number, world_size=count)
            loss(model, batch).backward()
            elastic.step()
            optimizer.zero_grad()
        elastic.leave()

    ``step`` may take over another replica's weights and step number: read ``optimizer.num_steps`` rather than count.

    A replica may be a site of several, each with an ElasticSiteTransport: all of them call everything together, and hold the same
    bits.

    Args:
        optimizer: of a recipe, built with an ElasticTransport or an ElasticSiteTransport.
        model: whose buffers a replica that joins takes over, too. Default: none.
        common: a text that is the same on all, such as a digest of weights that are not trained. Default: empty.

    Raises:
        UsageError: another transport, or an optimizer that is wrong where replicas come and go.
    """

    def __init__(
        self, optimizer: ChainOptimizer, *, model: torch.nn.Module | None = None, common: str = ""
    ) -> None:
        transport = optimizer.transport
        if not isinstance(transport, MembersTransport):
            raise UsageError(
                f"Elastic: the optimizer's transport is a {type(transport).__name__}; build the optimizer with an "
                "ElasticTransport, or an ElasticSiteTransport for a site"
            )
        _check_optimizer(optimizer)
        self.optimizer = optimizer
        self.transport = transport
        self.model = model
        self.common = common
        # Called with a line for the user where something becomes of this replica's own state.
        self.say: Callable[[str], None] = lambda line: None
        self._taken = False
        # The replicas that were there at any time.
        self._seen: set[str] = set()
        optimizer.synchronizes = False
        transport.give_state = self._give
        transport.take_state = self._take

    def join(self) -> None:
        """Meet the replicas that are there: begin together, or take over their state and their next synchronization.

        Raises:
            ExchangeError: too few replicas came in time, or they do not start from the same weights.
            UsageError: the others train something else.
            StoppedError: it was asked to stop while it waited.
        """
        optimizer = self.optimizer
        # A state that was loaded before says how far this replica is.
        done = (
            optimizer.num_steps
            if optimizer.local is None
            else int(optimizer.param_groups[0]["synchronizations"])
        )
        self.transport.commits = max(self.transport.commits, done)
        self._meet(None)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the optimizer, synchronized with those that are there where that is due.

        Raises:
            NonFiniteUpdateError: as the optimizer's ``step``; on all replicas.
            ExchangeError, StoppedError, UsageError: see ``join``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.optimizer.local is None:
            # Counted once, before the first attempt, so that a replica that joins knows the number.
            self.optimizer._gradients.take(self.optimizer.trained())
            self._meet(self.optimizer.step)
        else:
            self.optimizer.step()
            if self.optimizer.is_due():
                self._meet(self.optimizer.synchronize)
        return loss

    def synchronize(self) -> None:
        """Bring those that are there to the same weights, as ``ChainOptimizer.synchronize``; after the last step, for instance."""
        # Fragments that are due come first, and by themselves.
        while self.optimizer.local is not None and self.optimizer.steps_alone:
            self._meet(self.optimizer.synchronize)

    def finish(self, *, linger_s: float) -> None:
        """After the last step: wait for replicas that were there before and are away now, so that they get the last weights, too.

        A replica that comes back when nobody is left begins where its own last checkpoint is, alone.

        Args:
            linger_s: how long at most, in seconds; it ends at once where nobody is away.
        """
        transport, deadline = self.transport, time.monotonic() + linger_s
        stopping, told = transport.stopping, False
        transport.stopping = lambda: stopping() or time.monotonic() > deadline
        try:
            while away := sorted(self._seen - set(transport.members)):
                if transport.stops():
                    return
                if not told:
                    self.say(
                        f"the last step is done; away are {', '.join(away)}, which may fetch it for {linger_s:g} s"
                    )
                told = True
                time.sleep(_LINGER_PAUSE_S)
                self._meet(None)
        except StoppedError:
            return
        finally:
            transport.stopping = stopping

    def leave(self) -> None:
        """End this replica's part; the others go on without it."""
        self.transport.close()

    def _meet(self, act: Callable[[], Any] | None) -> None:
        """Meet until a synchronization is done, with ``act`` or, where this replica brings nothing, without."""
        try:
            self._meet_until_done(act)
        finally:
            self.transport.forget_attempt()

    def _meet_until_done(self, act: Callable[[], Any] | None) -> None:
        failures = 0
        # Once it has taken over the others' state it brings nothing, however often they must meet.
        self._taken = False
        while True:
            is_new = self.transport.form()
            try:
                self._synchronize(act, is_new=is_new)
            except NonFiniteUpdateError:
                # All replicas know, and leave the step out.
                self.transport.commit()
                raise
            except (ExchangeError, PayloadError) as error:
                self.transport.commit(failure=error)
                if isinstance(error, DivergedReplicasError):
                    raise
                failures = 0 if isinstance(error, ReplicaLostError | _NotYetError) else failures + 1
                if failures == ATTEMPTS:
                    raise
                continue
            except BaseException as error:
                self.transport.commit(failure=ExchangeError(str(error)))
                raise
            if self.transport.commit():
                return

    def _synchronize(self, act: Callable[[], Any] | None, *, is_new: bool) -> None:
        joins = act is None or self._taken
        if joins:
            self.transport.forget_attempt()
        if is_new:
            present = self._call_roll(joins=joins)
            trained = [p for p in present if not p.joins]
            if not trained:
                self._begin_together(present)
                return
            if act is not None and self._completes(trained):
                # The groups were compared in the attempt.
                self.optimizer.agreement.reached = True
                with self.transport.replaying():
                    act()
                return
            if joins and not self._taken:
                self._stand_with(trained[0])
        if joins:
            self._observe()
        elif act is not None:
            self.transport.attempt()
            act()

    def _completes(self, trained: Sequence[Present]) -> bool:
        """Whether this replica completes the last attempt by itself, out of the messages that it has.

        A replica moves its weights once all of its quorum have said that they have all messages. So one that is away may have moved
        its weights if, and only if, all the others of that quorum have them: then they move theirs in the same way. If one of them
        lacks a message, nobody has moved, and all repeat the synchronization.

        Raises:
            ExchangeError: the others complete one that this replica was not part of; it takes over their state.
        """
        attempt = max((p.attempted for p in trained if p.prepared), default=-1)
        of_attempt = [p for p in trained if p.attempted == attempt]
        if attempt < 0 or not all(p.prepared for p in of_attempt):
            return False
        if self.transport.attempted == attempt:
            return True
        raise _NotYetError(
            f"{', '.join(p.name for p in of_attempt)} completes a synchronization that {self.transport.name} takes over"
        )

    def _call_roll(self, *, joins: bool) -> list[Present]:
        """Who is here, and whether all stand on the same commit.

        Raises:
            UsageError: the others train something else.
            DivergedReplicasError: the replicas do not start from the same weights.
            ExchangeError: somebody has other weights or settings, and must take over the others' or leave, before all meet again.
        """
        optimizer, transport = self.optimizer, self.transport
        # The groups and weights are compared anew, in full.
        optimizer.agreement.reached = False
        own = Present(
            name=transport.name,
            joins=joins,
            commits=transport.commits,
            steps=optimizer.num_steps,
            alone=optimizer.steps_alone,
            gradients=optimizer._gradients.count,
            rates=[(float(g["lr"]), float(g["weight_decay"])) for g in optimizer.param_groups],
            weights=digest_all(optimizer.shared()).hex(),
            groups=self._settings(),
            attempted=transport.attempted,
            prepared=transport.prepared,
            replicas=transport.num_inside,
        )
        # Whoever joins knows neither the step nor the rates yet.
        transport.step, transport.settings = 0, ""
        with transport.patient():
            texts = transport.gather(json.dumps(asdict(own)).encode(), purpose="control")
        present = [Present.read(text, rank=rank) for rank, text in enumerate(texts)]
        self._seen.update(p.name for p in present)
        transport.sizes = [p.replicas for p in present]
        deciding = [p for p in present if not p.joins] or present
        self._check_settings(own, present, _commonest([p.groups for p in deciding]))
        weights = _commonest([p.weights for p in deciding])
        others = [p.name for p in present if p.weights != weights]
        if others and not any(p.commits for p in present):
            raise DivergedReplicasError(
                f"the replicas do not start from the same weights: {', '.join(others)} of {len(present)} have others than the "
                "rest; build the model with the same seed on all, or load the same weights"
            )
        # The same commit, but not the same number of steps since: what they would exchange belongs to different steps.
        place = _commonest([p.place for p in deciding])
        others += [p.name for p in present if not p.joins and p.place != place and p.name not in others]
        if others:
            if own.name in others:
                # The others have a commit that this replica lacks, or the other way round: it takes over theirs.
                transport.commits = 0
            raise _NotYetError(f"{', '.join(others)} stood elsewhere than the rest, and takes over its state")
        return present

    def _check_settings(self, own: Present, present: Sequence[Present], groups: str) -> None:
        strangers = [p.name for p in present if p.groups != groups]
        if own.name in strangers:
            raise UsageError(
                f"elastic: {own.name} trains something else than the other {len(present) - len(strangers)} replica(s): its model, "
                "recipe or options differ; give all the same"
            )
        if strangers:
            raise _NotYetError(f"{', '.join(strangers)} trains something else, and leaves")

    def _begin_together(self, present: Sequence[Present]) -> None:
        """Nobody has trained since they were last together: start, where necessary from the last synchronization."""
        self.optimizer._gradients.count = max(p.gradients for p in present)
        if len({(p.steps, p.alone) for p in present}) > 1:
            self._start_anew()
            self.say(
                "the replicas came back with different numbers of local steps: all go on from the last synchronization"
            )
        ensure_agreement(self.optimizer, self.optimizer.trained())

    def _stand_with(self, trained: Present) -> None:
        """Take over the counters of a replica that has trained on from the weights that this one has, too."""
        for group, (lr, weight_decay) in zip(self.optimizer.param_groups, trained.rates, strict=True):
            group |= {"lr": lr, "weight_decay": weight_decay, "step": trained.steps}
            group["synchronized_step"] = trained.steps - trained.alone
        self._forget_gradients(trained.gradients)

    def _forget_gradients(self, count: int) -> None:
        """Drop this replica's gradient, which belongs to other weights; ``count`` are all that the others were given."""
        self.optimizer.zero_grad()
        self.optimizer._gradients.count = count

    def _start_anew(self) -> None:
        """Go back to the last synchronization, with nothing of this replica's own."""
        self._forget_own()
        last = self.optimizer.last_synchronized
        for group in self.optimizer.param_groups:
            group["step"] = last

    def _observe(self) -> None:
        """Take part in the others' synchronization without bringing anything, then start with nothing of this replica's own."""
        optimizer, transport = self.optimizer, self.transport
        self._forget_own()
        transport.observes = True
        try:
            if optimizer.local is not None:
                optimizer.synchronize()
            else:
                _observe_step(optimizer)
        except NonFiniteUpdateError:
            # The others leave the step out.
            pass
        finally:
            transport.observes = False
        self._forget_own()
        # Found in this synchronization; a local step must not ask again.
        optimizer.agreement.reached = True

    def _forget_own(self) -> None:
        """Begin anew with what is this replica's own, and keep what all replicas share."""
        optimizer = self.optimizer
        processors = [group["processor"] for group in optimizer.param_groups]
        load_shared(optimizer, shared_part(optimizer))
        # Local steps stay those of the same processor, on which the replicas of a site have agreed.
        for group, processor in zip(optimizer.param_groups, processors, strict=True):
            group["processor"] = processor

    def _settings(self) -> str:
        optimizer = self.optimizer
        text = (
            f"{optimizer.local} {optimizer.look_ahead} {describe_groups(optimizer.param_groups)}{self.common}"
        )
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _give(self) -> dict[str, Any]:
        """The state for a replica that joins; copies, since it is sent while this one goes on."""
        optimizer = self.optimizer
        return {
            "groups": self._settings(),
            "optimizer": _copied(shared_part(optimizer)),
            # Where the optimizer keeps copies, they are in its state.
            "weights": {}
            if optimizer.local is not None or optimizer.look_ahead
            else {name: weight.detach().clone() for name, weight in optimizer.shared()},
            "buffers": {name: buffer.detach().clone() for name, buffer in self._buffers()},
            "gradients": optimizer._gradients.count,
        }

    @torch.no_grad()
    def _take(self, state: Mapping[str, Any]) -> None:
        """Take over what ``_give`` gave on another replica.

        Raises:
            UsageError: the other replica trains something else; nothing has changed.
        """
        optimizer = self.optimizer
        weights, buffers = dict(optimizer.named_parameters()), dict(self._buffers())
        if state["groups"] != self._settings() or _shapes(buffers) != _shapes(state["buffers"]):
            raise UsageError(
                f"elastic: {self.transport.name} trains something else than the replicas that are there: its model, recipe or "
                "options differ; give all the same"
            )
        lost = optimizer.steps_alone if optimizer.local is not None else 0
        for name, weight in state["weights"].items():
            weights[name].copy_(weight)
        for name, buffer in buffers.items():
            buffer.copy_(state["buffers"][name])
        load_shared(optimizer, state["optimizer"])
        self._forget_gradients(int(state["gradients"]))
        self._taken = True
        self.say(
            f"took over the weights of step {optimizer.num_steps} from another replica; what this one had not sent starts at zero"
            + (f", and its {lost} local steps since its last synchronization are lost" if lost else "")
        )

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        return [] if self.model is None else list(self.model.named_buffers())


def _observe_step(optimizer: ChainOptimizer) -> None:
    """The others' step, of an optimizer that exchanges in each, with zeros for this replica's gradient."""
    transport = optimizer.transport
    transport.step = optimizer._gradients.count
    ensure_agreement(optimizer, optimizer.trained())
    transport.settings = rates(optimizer.param_groups)
    exchange(optimizer, inner_passes(optimizer, zeros=True), None)
    optimizer._show_weights()
    optimizer._count(step=1)
    optimizer.record_weights()


class _NotYetError(ExchangeError):
    """The replicas must meet again before they can synchronize."""


def _commonest(texts: Sequence[str]) -> str:
    """The text that most have; of several, that of the lowest rank."""
    return Counter(texts).most_common(1)[0][0]


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _copied(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copied(value) for value in tree]
    return tree


def _check_optimizer(optimizer: ChainOptimizer) -> None:
    chains: list[Stage] = [*optimizer.chains, *optimizer.outer.values()]
    reasons = {
        f"{part.name}: {part.needs_same_replicas}"
        for chain in chains
        for part in _parts(chain)
        if part.needs_same_replicas
    }
    if optimizer.lifecycle.start == "broadcast":
        reasons.add(
            'start="broadcast": a replica that joins takes over the weights of those that are there anyway'
        )
    if reasons:
        raise UsageError(
            f"Elastic: the optimizer cannot train with replicas that come and go ({'; '.join(sorted(reasons))}); choose a recipe "
            "whose feedback is EF14 or none, such as one_bit_muon, or keep the replicas fixed"
        )


def _parts(stage: Stage) -> Iterator[Stage]:
    """The stage and all stages inside."""
    yield stage
    for value in vars(stage).values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            found = inner[1] if isinstance(inner, tuple) and len(inner) == 2 else inner
            if isinstance(found, Stage):
                yield from _parts(found)
