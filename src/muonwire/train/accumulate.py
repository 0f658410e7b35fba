"""A batch in parts: the gradient of the whole in the memory of a part."""

from collections.abc import Callable

from torch import Tensor

from muonwire.errors import UsageError
from muonwire.tasks.base import Batch


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch in equal parts along the first dimension of its tensors.

    Args:
        batch: tensors of one length.
        parts: at least 1.

    Raises:
        UsageError: the length is no multiple of ``parts``.
    """
    for tensor in batch.values():
        if len(tensor) % parts:
            raise UsageError(
                f"train: accumulate is {parts}, but a replica's batch is {len(tensor)}; give a divisor of --batch"
            )
    pieces = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [{name: tensors[i] for name, tensors in pieces.items()} for i in range(parts)]


def accumulate(loss: Callable[[Batch], Tensor], batch: Batch, *, parts: int) -> float:
    """Add the gradient of the mean loss over the batch to the parameters' ``grad``; returns that loss.

    Args:
        loss: of a part, the mean over it.
        batch: see split_batch.
        parts: in which it is computed.
    """
    value = 0.0
    for part in [batch] if parts == 1 else split_batch(batch, parts):
        share = loss(part) / parts
        share.backward()  # type: ignore[no-untyped-call]
        value += float(share.detach())
    return value
