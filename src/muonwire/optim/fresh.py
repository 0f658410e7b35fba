"""The state of a parameter that has taken no step."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muonwire.optim.groups import AROUND, OUTER
from muonwire.optim.kept import FRAGMENT, MASTER, SHARED, unsent, wide_dtype
from muonwire.optim.nested import all_shared_out
from muonwire.stages.base import State
from muonwire.stages.chain import Chain
from muonwire.stages.layout import MatrixLayout
from muonwire.transport.shards import is_sharded

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer


def fresh_state(optimizer: "ChainOptimizer", param: Tensor, members: Chain, layout: str) -> State:
    """The state with which a parameter begins; what has a sharded parameter's shape in it is sharded like it.

    Args:
        optimizer: of the parameter.
        param: that is trained.
        members: the chain of its group.
        layout: of the parameter, in textual form.
    """
    wide = param.detach().to(wide_dtype(param))
    state = _of_chain(members, wide, layout)
    if optimizer.around is not None:
        state[AROUND] = optimizer.around.state[param]
    if optimizer.keeps_master(param):
        state[MASTER] = wide.clone()
    if optimizer.local is not None or optimizer.look_ahead:
        state[SHARED] = wide.clone()
    if optimizer.local is not None:
        state[OUTER] = _of_chain(optimizer.outer[param], wide, layout)
        if optimizer.streaming is not None:
            state[FRAGMENT] = optimizer.streaming.fresh(param)
    if optimizer.look_ahead:
        unsent(state, optimizer.look_ahead)
    return state


def _of_chain(members: Chain, wide: Tensor, layout: str) -> State:
    state: State = dict(members.init(wide))
    # It has the shape, and no memory.
    shape_alone = torch.zeros((), dtype=wide.dtype, device=wide.device).expand(wide.shape)
    members.prepare(state, shape_alone, MatrixLayout.parse(layout))
    return all_shared_out(state, wide) if is_sharded(wide) else state
