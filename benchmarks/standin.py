"""A stand-in for an accelerator: its tensors lie in the CPU's memory, but say that they are elsewhere; crossings are counted.

`python -m benchmarks.standin` tries it. A tensor of the stand-in has the device "lazy", which torch knows by name and has no
kernels for. Operations on it are those of the CPU, with their bits, under the rules of a real accelerator: what mixes it with a
tensor of the CPU fails, unless that has no dimensions and torch's own list of operations says that they may mix; ``.numpy()`` and
``.tolist()`` fail; a number of the host divides by its reciprocal, as CUDA has it; ``cumsum`` of floats fails where deterministic
algorithms are asked for; what brings values to the host, or lets the host wait for one (``.item()``, ``bool()``, ``torch.equal``,
``nonzero``), is a crossing.

    with StandIn() as device:
        x = torch.ones(4, device=device.name)
        float(x.sum())
    device.to_host  # one crossing of 4 bytes
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
_aten = torch.ops.aten
# Results whose size depends on values, or that the host itself gets: an accelerator's queue is empty when they return.
_WAITS = {
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten.bincount,
    _aten._unique2,
    _aten.unique_dim,
    _aten._linalg_check_errors,
    _aten._linalg_svd,
    _aten._linalg_eigh,
}


class StandInTensor(Tensor):
    """Holds a tensor of the CPU, ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "StandInTensor":
        """Its shape, strides and dtype are those of ``inner``."""
        made: StandInTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Called where no StandIn is active."""
        raise RuntimeError(f"{func}: a tensor of the stand-in device outside of its context")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StandInTensor({self.held!r})"


@dataclass
class Crossings:
    """Operations that let bytes cross, by their names.

    Args:
        count: how many.
        num_bytes: of all together.
        by_operation: how many of each.
        sizes: bytes of each, in order.
    """

    count: int = 0
    num_bytes: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)

    def add(self, operation: str, num_bytes: int) -> None:
        """One more."""
        self.count += 1
        self.num_bytes += num_bytes
        self.by_operation[operation] += 1
        self.sizes.append(num_bytes)


class StandIn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within its context, in this thread, tensors can be made on and moved to the stand-in device, and crossings are counted.

    ``to_host`` are those for which the host waits; ``to_device`` are those of tensors of the CPU.

    Args:
        float64: whether the device has it; Apple's has not. Default: True.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and asking not to would import torch's compiler.
        return False

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._float64 = float64
        self.to_host, self.to_device = Crossings(), Crossings()
        # Of those to the device, how many the host waits for: those that are not asked not to.
        self.blocking = 0

    @property
    def name(self) -> torch.device:
        """What to give as ``device``."""
        return DEVICE

    def __enter__(self) -> "StandIn":
        """Begin; ``torch.tensor`` then makes its tensors on the CPU and moves them, so that they are seen."""
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def forget(self) -> None:
        """Count from zero."""
        self.to_host, self.to_device, self.blocking = Crossings(), Crossings(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in given if isinstance(x, StandInTensor)]
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == DEVICE.type:
            kwargs["device"] = torch.device("cpu")
        elif target is None:
            target = DEVICE if ours else torch.device("cpu")
        here = torch.device(target).type == DEVICE.type
        name = func.overloadpacket
        if name is _aten._to_copy:
            waits = not kwargs.get("non_blocking", False)
            self._copied(str(name), from_ours=bool(ours), to_ours=here, x=given[0], waits=waits)
            if bool(ours) != here:
                # A copy from one memory to another is one, even where this one has the dtype and layout already.
                return _wrapped(func(_inner(args[0]), **kwargs), {}, here=here)
        elif name is _aten.copy_:
            here = isinstance(args[0], StandInTensor)
            from_ours = isinstance(args[1], StandInTensor)
            waits = not (len(args) > 2 and args[2])
            self._copied(str(name), from_ours=from_ours, to_ours=here, x=args[1], waits=waits)
        elif ours:
            self._check_mix(func, given)
            if name is _aten._local_scalar_dense:
                self.to_host.add(str(name), given[0].element_size())
            elif (
                name in _WAITS
                or (name in (_aten.index, _aten.index_put_, _aten.index_put) and _masked(args[1]))
                or (name is _aten.repeat_interleave and kwargs.get("output_size") is None and len(args) < 3)
            ):
                self.to_host.add(str(name), 8)
            elif name is _aten.cumsum and given[0].is_floating_point():
                self._check_repeats(str(name))
            elif name in (_aten.div, _aten.div_) and _divides_by_reciprocal(args, kwargs):
                return _by_reciprocal(args[0], float(args[1]), in_place=name is _aten.div_)
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if here and not self._float64:
            self._check_dtypes(str(name), result)
        return _wrapped(result, {id(x.held): x for x in ours}, here=here)

    def _copied(self, operation: str, *, from_ours: bool, to_ours: bool, x: Tensor, waits: bool) -> None:
        if from_ours and not to_ours:
            self.to_host.add(operation, x.nbytes)
        elif to_ours and not from_ours:
            self.to_device.add(operation, x.nbytes)
            self.blocking += waits

    @staticmethod
    def _check_mix(func: Any, given: list[Tensor]) -> None:
        for x in given:
            if not isinstance(x, StandInTensor) and (x.ndim or not _may_mix(func)):
                raise RuntimeError(
                    f"{func.overloadpacket}: expected all tensors to be on the same device, but found {DEVICE} and cpu (of shape "
                    f"{tuple(x.shape)})"
                )

    @staticmethod
    def _check_repeats(operation: str) -> None:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                f"{operation} of floats does not have a deterministic implementation on {DEVICE}"
            )

    @staticmethod
    def _check_dtypes(operation: str, result: Any) -> None:
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            raise TypeError(f"{operation}: {DEVICE} does not support float64")


@cache
def _unchecked() -> frozenset[str]:
    """The operations of which torch does not compare the devices of the arguments, so that one may be a number of the CPU."""
    listed = (
        Path(torch.__file__).parents[1]
        / "torchgen"
        / "packaged"
        / "ATen"
        / "native"
        / "native_functions.yaml"
    )
    entries = listed.read_text(encoding="utf-8").split("\n- func: ")[1:]
    return frozenset(e.split("(", 1)[0] for e in entries if "device_check: NoCheck" in e)


def _may_mix(func: Any) -> bool:
    return (
        func._schema.name.removeprefix("aten::") + f".{func._schema.overload_name}".rstrip(".")
        in _unchecked()
    )


def _divides_by_reciprocal(args: Any, kwargs: Any) -> bool:
    by_number = not isinstance(args[1], StandInTensor)
    floats = isinstance(args[0], StandInTensor) and args[0].is_floating_point()
    return by_number and floats and kwargs.get("rounding_mode") is None


def _by_reciprocal(x: StandInTensor, divisor: float, *, in_place: bool) -> StandInTensor:
    """x times 1/divisor, in float32 at least, as CUDA divides by a number of the host: the last bit may not be the quotient's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    result = (x.held.to(wide) * torch.tensor(divisor, dtype=wide).reciprocal()).to(x.dtype)
    if in_place:
        x.held.copy_(result)
        return x
    return StandInTensor(result)


def _masked(indices: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _inner(value: Any) -> Any:
    return value.held if isinstance(value, StandInTensor) else value


def _wrapped(result: Any, known: dict[int, StandInTensor], *, here: bool) -> Any:
    """Tensors of a result as the stand-in's; what an operation wrote in place stays the tensor that it is."""
    if not here:
        return result
    return tree_map(
        lambda x: known[id(x)] if id(x) in known else StandInTensor(x) if isinstance(x, Tensor) else x, result
    )


def main() -> None:
    """Try it."""
    with StandIn() as device:
        x = torch.arange(6.0, device=device.name).view(2, 3)
        print(x.device, float((x @ x.mT).sum()), x.cpu().tolist())
    print(f"to the host: {dict(device.to_host.by_operation)}, {device.to_host.num_bytes} bytes")


if __name__ == "__main__":
    main()
