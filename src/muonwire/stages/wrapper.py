"""A stage that applies another one and changes what it is given or returns."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Stage, State
from muonwire.stages.layout import MatrixLayout


@dataclass(frozen=True, kw_only=True)
class Wrapper(Stage):
    """What such stages share: they keep no state of their own.

    Args:
        stage: that is applied; one that talks to no other replica.

    Raises:
        UsageError: the stage talks to the other replicas.
    """

    stage: Stage

    def __post_init__(self) -> None:
        if self.stage.talks:
            raise UsageError(f"{self.name}: {self.stage} talks to the other replicas; put it before or after")

    @property
    @override
    def orthogonalizes(self) -> bool:
        return self.stage.orthogonalizes

    @property
    @override
    def multiplies(self) -> bool:
        return self.stage.multiplies

    @property
    @override
    def reads_params(self) -> bool:
        return self.stage.reads_params

    @override
    def init(self, param: Tensor) -> State:
        return self.stage.init(param)

    @override
    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:
        self.stage.prepare(state, param, layout)

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """That of the stage."""
        return self.stage.shared_state(state, alike=alike)
