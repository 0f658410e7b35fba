"""The text of an optimizer, ``repr(optimizer)``: its groups with their chains, a line each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from muonwire.optim.kept import MASTER, SHARED
from muonwire.optim.passes import outer_passes

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer


def describe(optimizer: "ChainOptimizer") -> str:
    """The number of replicas, how they step, and the chain of each group."""
    transport = optimizer.transport
    replicas = transport.world_size
    about = [f"{replicas} replica{'s' * (replicas != 1)}"]
    if transport.shards_inside:
        about[0] += f" of {transport.num_inside} processes, which share its weights"
    elif transport.num_inside > 1:
        when = "at every step" if transport.averages_inside else "by the loop"
        sites = "a site" if replicas == 1 else f"{replicas} sites"
        about = [f"{sites} of {transport.num_inside} replicas, their gradients averaged {when}"]
    outer = outer_passes(optimizer) if optimizer.local is not None else []
    if optimizer.local is not None:
        about.append(str(optimizer.local))
    if optimizer.adapting is not None:
        about.append(optimizer.adapting.text())
    if optimizer.look_ahead:
        about.append(f"looking ahead by {'.'.join(optimizer.look_ahead)}")
    if any(chain.orthogonalizes for chain in [*optimizer.chains, *(p.chain for p in outer)]):
        processor = optimizer.processor
        about.append(f"polar factors as on {processor.name} processors: {str(processor.dtype)[6:]}")
    lines = [f"{type(optimizer).__name__} ({'; '.join(about)})"]
    for group in optimizer.param_groups:
        lines.append(
            f"  {group['name']}: {_size(group['params'])}, lr={float(group['lr']):g}, "
            f"weight_decay={group['weight_decay']:g}: {group['chain']}"
        )
    lines += [f"  synchronized: {_size(p.params)}, lr={p.context.lr:g}: {p.chain}" for p in outer]
    narrow = [p for _, p in optimizer.named_parameters() if p.element_size() < 4]
    wide = [
        p
        for p in narrow
        if MASTER in optimizer.state[p] or (optimizer.look_ahead and SHARED in optimizer.state[p])
    ]
    if wide:
        lines.append(f"  16-bit weights: {_size(wide)} with float32 masters")
    if len(wide) < len(narrow):
        rest = [p for p in narrow if all(p is not w for w in wide)]
        lines.append(
            f"  16-bit weights: {_size(rest)} without float32 masters; updates below their last bit are lost"
        )
    return "\n".join(lines)


def _size(params: Sequence[Tensor]) -> str:
    return f"{len(params)} tensor{'s' * (len(params) != 1)}, {sum(p.numel() for p in params):,} parameters"
