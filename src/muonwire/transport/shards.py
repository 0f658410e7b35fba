"""Tensors of which this process holds a shard (DTensor), and how they are cut.

Of S processes, process s holds entries s · ⌈n/S⌉ up to (s + 1) · ⌈n/S⌉ along the dimension of n that is cut, as torch's DTensor has
it; the last shards may be shorter, or empty.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor.

    >>> is_sharded(torch.zeros(2))
    False
    """
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's shard, in the memory of ``tensor``; the tensor itself where it is whole.

    >>> whole = torch.zeros(2)
    >>> local(whole) is whole
    True
    """
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        shard: Tensor = to_local()
        return shard


def reshard(model: nn.Module) -> None:
    """Let modules that ``fully_shard`` wraps hold shards again, and gather whole weights anew when they are called next.

    After a forward pass without a backward one some keep the whole weights that they have gathered: the outermost one, and others
    with ``reshard_after_forward=False``. These stay what they were when shards change, and are the parameters that the model names.

    Args:
        model: whose modules they are; without any, nothing happens.
    """
    # Imported by whoever has such a module.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor that is cut into shards.

    Args:
        shape: of the whole.
        dim: along which it is cut.
        count: S, the number of processes.
    """

    shape: tuple[int, ...]
    dim: int
    count: int

    def bounds(self, place: int) -> tuple[int, int]:
        """First entry and end of a process's shard along ``dim``."""
        size = self.shape[self.dim]
        each = -(-size // self.count)
        return min(size, place * each), min(size, (place + 1) * each)

    def of(self, whole: Tensor, place: int) -> Tensor:
        """A process's shard, in the memory of the whole."""
        begin, end = self.bounds(place)
        return whole.narrow(self.dim, begin, end - begin)

    def shard_shape(self, place: int) -> tuple[int, ...]:
        """That of a process's shard."""
        begin, end = self.bounds(place)
        return (*self.shape[: self.dim], end - begin, *self.shape[self.dim + 1 :])

    def numel(self, place: int) -> int:
        """Entries of a process's shard."""
        return torch.Size(self.shard_shape(place)).numel()


def cut_of(param: Any, shape: Sequence[int] | None = None) -> Cut | None:
    """How a sharded parameter is cut, or a tensor of its state; None where that is not of the parameter's shape.

    Args:
        param: a DTensor.
        shape: of the state, of which the last dimensions are the parameter's. Default: the parameter's.
    """
    own = tuple(param.shape)
    shape = own if shape is None else tuple(shape)
    more = len(shape) - len(own)
    if more < 0 or shape[more:] != own:
        return None
    (placement,) = param.placements
    return Cut(shape=shape, dim=placement.dim % len(own) + more, count=param.device_mesh.size())


def as_sharded(shard: Tensor, cut: Cut, param: Any) -> Tensor:
    """The DTensor whose shard this is, on the parameter's mesh."""
    # Imported by whoever has such a parameter.
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(cut.shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        shard,
        param.device_mesh,
        (Shard(cut.dim),),
        run_check=False,
        shape=torch.Size(cut.shape),
        stride=stride,
    )
    return made


def place_of(param: Any) -> int:
    """Which of the processes that share the parameter this one is."""
    place: int = param.device_mesh.get_local_rank()
    return place


def shared_out(value: Tensor, param: Tensor) -> Tensor:
    """A tensor of a parameter's state as it is kept: sharded like the parameter where it has its shape, else whole.

    Args:
        value: whole, the same on all processes; or a DTensor on any mesh.
        param: that may be sharded.
    """
    if not is_sharded(param):
        return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    cut = cut_of(param, value.shape)
    if is_sharded(value):
        alike: Any = value
        same_mesh = alike.device_mesh == param.device_mesh  # type: ignore[attr-defined]
        if cut is not None and same_mesh and cut == cut_of_placed(alike):
            return value
        value = alike.full_tensor()
    if cut is None:
        return value
    return as_sharded(cut.of(value, place_of(param)).contiguous(), cut, param)


def is_cut_alike(gradient: Any, param: Any) -> bool:
    """Whether a gradient's shards are those of its parameter; so are two that are both whole.

    >>> is_cut_alike(torch.zeros(2), torch.zeros(2))
    True
    """
    if not is_sharded(param) or not is_sharded(gradient):
        return is_sharded(param) is is_sharded(gradient)
    same_mesh = gradient.device_mesh == param.device_mesh
    return bool(same_mesh and tuple(gradient.placements) == tuple(param.placements))


def cut_of_placed(tensor: Any) -> Cut | None:
    """How a DTensor is cut; None where it is not, or in more ways than one."""
    if len(tensor.placements) != 1 or type(tensor.placements[0]).__name__ != "Shard":
        return None
    return Cut(
        shape=tuple(tensor.shape),
        dim=tensor.placements[0].dim % max(tensor.ndim, 1),
        count=tensor.device_mesh.size(),
    )
