"""Nested states of sharded parameters: their shards, what of them is cut, and how the owner of a tensor tells the rest."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.stages.base import State
from muonwire.transport.shards import as_sharded, cut_of, local, place_of, shared_out

Path = tuple[str, ...]


def copied(state: State) -> State:
    """The dicts anew, with the same entries."""
    return {key: copied(value) if isinstance(value, dict) else value for key, value in state.items()}


def all_shared_out(state: State, param: Tensor) -> State:
    """Nested states as they are kept beside a sharded parameter; see ``shared_out``."""
    return {
        key: all_shared_out(value, param)
        if isinstance(value, dict)
        else shared_out(value, param)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }


def localized(state: State) -> State:
    """Nested states with this process's shards."""
    return {
        key: localized(value)
        if isinstance(value, dict)
        else local(value)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }


def write_back(own: State, state: State, param: Tensor) -> None:
    """Put what was replaced in localized states into those of the parameter."""
    for key, value in own.items():
        if isinstance(value, dict):
            write_back(value, state.setdefault(key, {}), param)
        elif not isinstance(value, Tensor):
            state[key] = value
        else:
            before = state.get(key)
            if isinstance(before, Tensor) and local(before).data_ptr() == value.data_ptr() and value.numel():
                continue
            more = value.ndim - param.ndim
            cut = cut_of(param, (*value.shape[: max(more, 0)], *param.shape))
            fits = cut is not None and tuple(value.shape) == cut.shard_shape(place_of(param))
            state[key] = as_sharded(value, cut, param) if fits and cut is not None else value


def leaves(state: State, names: set[str] | None = None, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What nested states hold, of the members of these names; empty states too."""
    for key, value in state.items():
        if names is not None and key not in names:
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, None, (*path, key))
        else:
            yield (*path, key), value


def tensors_of(state: State, names: set[str]) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in nested states, of the members of these names."""
    for path, value in leaves(state, names):
        if isinstance(value, Tensor):
            yield path, value


def at(state: State, path: Path) -> Any:
    """What nested states hold at a path; None where there is nothing."""
    found: Any = state
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def put(state: State, path: Path, value: Any) -> None:
    """Put a value at a path that exists."""
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = value


# What owners tell: JSON, and behind it the bytes of the tensors

_LENGTH = struct.Struct("<Q")
_CUT, _TENSOR, _VALUE, _STATE = "cut", "tensor", "value", "state"
_DTYPE, _SHAPE, _STRIDE = "tensor of dtype", "shape", "stride"


def described(state: State, cut: set[Path], path: Path = ()) -> dict[str, Any]:
    """Nested states by kind: tensors as they are, and those that are cut by their name alone."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        here = (*path, key)
        if isinstance(value, dict):
            found[key] = [_STATE, described(value, cut, here)]
        elif here in cut:
            found[key] = [_CUT]
        elif isinstance(value, Tensor):
            found[key] = [_TENSOR, value, value.device.type]
        else:
            found[key] = [_VALUE, value]
    return found if path else {key: value[1] for key, value in found.items()}


def read(told: dict[str, Any], own: Any, param: Tensor) -> State:
    """The states that ``described`` stands for; those that are cut are this process's ``own``."""
    own = own if isinstance(own, dict) else {}
    found: State = {}
    for key, (kind, *value) in told.items():
        if kind == _STATE:
            found[key] = read(value[0], own.get(key), param)
        elif kind == _CUT:
            found[key] = own[key]
        elif kind == _TENSOR:
            # What a codec keeps may be on the CPU whatever the weights are on.
            tensor = value[0] if value[1] == "cpu" else value[0].to(local(param).device)
            found[key] = shared_out(tensor, param)
        else:
            found[key] = value[0]
    return found


def _is_dense(tensor: Tensor) -> bool:
    """Whether the entries lie in memory without gaps and each once, in whichever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def packed(told: Any) -> bytes:
    """A message out of lists, dicts, numbers, texts and tensors; these keep their order in memory, on which rounding depends.

    Raises:
        UsageError: something of another kind.
    """
    tensors: list[Tensor] = []

    def encode(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value if _is_dense(value) else value.contiguous()
            tensors.append(value)
            return {
                _DTYPE: str(value.dtype).removeprefix("torch."),
                _SHAPE: list(value.shape),
                _STRIDE: list(value.stride()),
            }
        raise UsageError(
            f"ChainOptimizer: a state of type {type(value).__name__} cannot be told to other processes"
        )

    text = json.dumps(told, default=encode).encode()
    flat = [t.detach().as_strided((t.numel(),), (1,)).cpu() for t in tensors]
    bodies = [t.view(torch.uint8).numpy().tobytes() for t in flat]
    return b"".join([_LENGTH.pack(len(text)), text, *bodies])


def unpacked(message: bytes) -> Any:
    """The inverse of packed; tensors are on the CPU.

    >>> unpacked(packed([1, {"a": torch.arange(3)}]))
    [1, {'a': tensor([0, 1, 2])}]
    """
    (length,) = _LENGTH.unpack_from(message)
    position = _LENGTH.size + length

    def decode(value: dict[str, Any]) -> Any:
        nonlocal position
        if _DTYPE not in value:
            return value
        dtype: torch.dtype = getattr(torch, value[_DTYPE])
        shape = torch.Size(value[_SHAPE])
        num_bytes = shape.numel() * dtype.itemsize
        body = bytearray(message[position : position + num_bytes])
        position += num_bytes
        if not body:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(body, dtype=dtype).as_strided(shape, value[_STRIDE])

    return json.loads(message[_LENGTH.size : _LENGTH.size + length], object_hook=decode)
