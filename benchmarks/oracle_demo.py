"""DeMo's compression written plainly: the oracle that the codec `dct | topk | ...` is compared with.

Chunked cosine transform by einsum, top-k of each chunk, int64 indices and float32 values on the wire, as the published code of
"DeMo: Decoupled Momentum Optimization" (Peng et al., arXiv 2411.19870) sends them. For matrices whose sides the chunk divides.
"""

import torch
from torch import Tensor

from muonwire.codec.transform.dct import cosine_basis


def demo_encode(x: Tensor, *, chunk: int = 64, k: int = 32) -> tuple[bytes, bytes]:
    """(indices, values) of the ``k`` largest coefficients of each chunk, as bytes.

    >>> indices, values = demo_encode(torch.eye(8), chunk=4, k=2)
    >>> len(indices), len(values)
    (64, 32)
    """
    rows, columns = x.shape
    basis = cosine_basis(chunk, x.dtype, x.device)
    chunks = x.view(rows // chunk, chunk, columns // chunk, chunk).permute(0, 2, 1, 3)
    coefficients = torch.einsum("yxij,bi,dj->yxbd", chunks, basis, basis).reshape(-1, chunk * chunk)
    indices = coefficients.abs().topk(k, dim=1, sorted=False).indices
    return indices.numpy().tobytes(), coefficients.gather(1, indices).numpy().tobytes()


def demo_decode(
    parts: tuple[bytes, bytes], shape: tuple[int, int], *, chunk: int = 64, k: int = 32
) -> Tensor:
    """The float32 matrix of ``shape`` behind (indices, values).

    >>> demo_decode(demo_encode(torch.eye(8), chunk=4, k=16), (8, 8), chunk=4, k=16).diagonal().round()
    tensor([1., 1., 1., 1., 1., 1., 1., 1.])
    """
    rows, columns = shape
    indices = torch.frombuffer(bytearray(parts[0]), dtype=torch.int64).view(-1, k)
    values = torch.frombuffer(bytearray(parts[1]), dtype=torch.float32).view(-1, k)
    coefficients = torch.zeros(len(indices), chunk * chunk).scatter_(1, indices, values)
    basis = cosine_basis(chunk, torch.float32, values.device)
    chunks = coefficients.view(rows // chunk, columns // chunk, chunk, chunk)
    return torch.einsum("yxbd,bi,dj->yxij", chunks, basis, basis).permute(0, 2, 1, 3).reshape(shape)
