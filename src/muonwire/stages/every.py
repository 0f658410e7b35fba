"""One chain every so many steps, another in between."""

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, Stage, State, States, TalkingStage, Tensors
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Rounds


class Every(TalkingStage):
    """In steps P, 2 P, 3 P, … the updates pass through ``full``, in all others through ``otherwise``.

    States of the two are kept apart, under "full" and "otherwise", unless both stand for the same buffers: name those in
    ``shared``; each is then kept once, and both chains see it.

    Args:
        period: P, at least 1; 1 is ``full`` always.
        full: a stage.
        otherwise: a stage.
        shared: state entries that both chains know under the same name. Default: none.

    Raises:
        UsageError: P < 1.
    """

    def __init__(self, *, period: int, full: Stage, otherwise: Stage, shared: Sequence[str] = ()) -> None:
        if period < 1:
            raise UsageError(f"every: period is {period}; it must be at least 1 step")
        self.period = period
        self.full = full
        self.otherwise = otherwise
        self.shared = tuple(shared)

    @property
    @override
    def talks(self) -> bool:
        return self.full.talks or self.otherwise.talks

    @property
    @override
    def orthogonalizes(self) -> bool:
        return self.full.orthogonalizes or self.otherwise.orthogonalizes

    @property
    @override
    def multiplies(self) -> bool:
        return self.full.multiplies or self.otherwise.multiplies

    @property
    @override
    def reads_params(self) -> bool:
        return self.full.reads_params or self.otherwise.reads_params

    @override
    def init(self, param: Tensor) -> State:
        """The states of both chains."""
        full, otherwise = self.full.init(param), self.otherwise.init(param)
        for name in self.shared:
            full.pop(name)
        return {"full": full, "otherwise": otherwise}

    @override
    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:
        """Of both chains; what they share is that of ``otherwise``."""
        self.otherwise.prepare(state["otherwise"], param, layout)
        self.full.prepare(state["full"], param, layout)
        for name in self.shared:
            state["full"].pop(name, None)

    @override
    def returns_alike(self, *, alike: bool) -> bool:
        """Where both chains' updates are."""
        return self.full.returns_alike(alike=alike) and self.otherwise.returns_alike(alike=alike)

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """Those of both chains."""
        return {
            "full": self.full.shared_state(state.get("full", {}), alike=alike),
            "otherwise": self.otherwise.shared_state(state.get("otherwise", {}), alike=alike),
        }

    @override
    def estimate_bytes(
        self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int
    ) -> float | None:
        """The mean over P steps, one of them full."""
        full = self.full.estimate_bytes(params, layouts, replicas=replicas)
        otherwise = self.otherwise.estimate_bytes(params, layouts, replicas=replicas)
        if full is None or otherwise is None:
            return None
        return (full + (self.period - 1) * otherwise) / self.period

    @override
    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        if context.step % self.period:
            seen = [s["otherwise"] for s in states]
            return (yield from self.otherwise.rounds(updates, params, seen, context))
        for state in states:
            state["full"].update({name: state["otherwise"].pop(name) for name in self.shared})
        results = yield from self.full.rounds(updates, params, [s["full"] for s in states], context)
        for state in states:
            state["otherwise"].update({name: state["full"].pop(name) for name in self.shared})
        return results

    def __str__(self) -> str:
        return f"every({self.period}: [{self.full}], else [{self.otherwise}])"
