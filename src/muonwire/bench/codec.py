"""Measuring codecs: rate against distortion, and speed against DeMo's own scheme, in one interleaved run."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonwire.codec.part import Shape
from muonwire.codec.pipeline import Pipeline
from muonwire.codec.quantize import Sign
from muonwire.codec.text import parse
from muonwire.codec.transform.base import largest_divisor
from muonwire.codec.transform.dct import cosine_basis
from muonwire.errors import UsageError

# What is measured by default. A line adds a codec; the error of one that keeps no scale says nothing.
CODECS = (
    "float32",
    "bfloat16",
    "sign(scale=tensor)",
    "sign(scale=row)",
    "topk(density=0.25) | sign(scale=tensor)",
    "topk(density=0.1) | sign(scale=tensor)",
    "topk(density=0.05) | sign(scale=tensor)",
    "topk(density=0.01) | sign(scale=tensor)",
    "topk(density=0.05) | bfloat16",
    "dct(chunk=64) | topk(k=256) | sign(scale=chunk)",
    "dct(chunk=64) | topk(k=32) | sign(scale=chunk)",
    "dct(chunk=64) | topk(k=32) | bfloat16",
    "int(bits=8, scale=row, rounding=nearest)",
    "codebook(bits=2, scale=row, fit=lloyd)",
    "ternary(scale=row, rounding=search)",
    "topk(density=0.05) | codebook(bits=2, scale=tensor, fit=lloyd)",
    "hadamard(block=1024) | sign(scale=chunk)",
    "randomk(density=0.05) | bfloat16",
    "lowrank(rank=4, method=power, iterations=1) | bfloat16",
)
REFERENCE = "DeMo, plain"
DEMO_CHUNK, DEMO_K = 64, 32


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One codec on one input.

    Args:
        input: name of the input.
        shape: its shape.
        codec: the codec's textual form, or REFERENCE.
        num_bytes: of the payload, header included.
        bits: 8 × bytes over elements.
        bound_bits: the same by ``entropy_bits``; NaN for the reference.
        error: ‖x − decoded‖_F/‖x‖_F.
        encode_s, decode_s: median times.
        encode_mb_s, decode_mb_s: 10⁶ bytes of float32 input a second.
        encode_ratio, decode_ratio: median over the rounds of the reference's time over this codec's in the same round.
    """

    input: str
    shape: Shape
    codec: str
    num_bytes: int
    bits: float
    bound_bits: float
    error: float
    encode_s: float
    decode_s: float
    encode_mb_s: float
    decode_mb_s: float
    encode_ratio: float
    decode_ratio: float


def demo_encode(x: Tensor, *, chunk: int = DEMO_CHUNK, k: int = DEMO_K) -> tuple[bytes, bytes]:
    """DeMo's scheme as its paper and code have it: DCT of chunks, topk of each, int64 indices and float32 values.

    The slow and plain peer of "dct(chunk=64) | topk(k=32) | float32", whose values it gives, in 12 bytes a coefficient.

    Args:
        x: (m, n), float32.
        chunk: largest chunk a dimension. Default: 64.
        k: coefficients a chunk. Default: 32.

    Returns:
        The indices inside each chunk, and the values.

    Source: Peng et al., arXiv 2411.19870, section 3.
    """
    m, n = x.shape
    height, width = largest_divisor(m, chunk), largest_divisor(n, chunk)
    chunks = x.view(m // height, height, n // width, width)
    left, right = (cosine_basis(size, x.dtype, x.device) for size in (height, width))
    coefficients = torch.einsum("yhxw,kh,lw->yxkl", chunks, left, right).reshape(-1, height * width)
    indices = coefficients.abs().topk(min(k, height * width), dim=1).indices
    return indices.numpy().tobytes(), coefficients.gather(1, indices).numpy().tobytes()


def demo_decode(
    message: tuple[bytes, bytes], shape: tuple[int, int], *, chunk: int = DEMO_CHUNK, k: int = DEMO_K
) -> Tensor:
    """The inverse of demo_encode.

    >>> x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(demo_decode(demo_encode(x, k=24), (6, 4), k=24), x, atol=1e-6))
    True
    """
    m, n = shape
    height, width = largest_divisor(m, chunk), largest_divisor(n, chunk)
    kept = min(k, height * width)
    indices = torch.frombuffer(bytearray(message[0]), dtype=torch.int64).view(-1, kept)
    values = torch.frombuffer(bytearray(message[1]), dtype=torch.float32).view(-1, kept)
    coefficients = torch.zeros(indices.shape[0], height * width).scatter_(1, indices, values)
    left, right = (cosine_basis(size, torch.float32, torch.device("cpu")) for size in (height, width))
    grid = coefficients.view(m // height, n // width, height, width)
    return torch.einsum("yxkl,kh,lw->yhxw", grid, left, right).reshape(m, n)


def entropy_bits(codec: Pipeline, shape: Shape) -> float:
    """The fewest bits that can tell which items are chosen, all choices being equally likely, and the bits of their values.

    G log2 C(n, k) + the values, for k of n items in each of G groups; a value of ``sign`` is one bit, without the scales.

    >>> round(entropy_bits(parse("topk(density=0.5) | sign(scale=tensor)"), (2, 4)), 6)  # log2 C(8, 4) + 4
    10.129283
    """
    num_blocks, block_numel = codec.transform.grid(shape)
    count = codec.select.count(num_blocks, block_numel)
    value_bits = (
        count if isinstance(codec.quantize, Sign) else 8 * codec.quantize.num_bytes(count, num_blocks)
    )
    if codec.select.shared or count == num_blocks * block_numel:
        return float(value_bits)
    groups = codec.select.groups(num_blocks, block_numel)
    n, k = groups.group_numel, groups.k
    log2_choices = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    return groups.num_groups * log2_choices + value_bits


def inputs(shapes: Sequence[tuple[int, int]], *, seed: int = 0) -> dict[str, Tensor]:
    """Independent Gaussian and Laplace matrices of each shape.

    >>> list(inputs([(4, 8)]))
    ['Gaussian 4x8', 'Laplace 4x8']
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for m, n in shapes:
        made[f"Gaussian {m}x{n}"] = torch.randn(m, n, generator=generator)
        signs = torch.randint(0, 2, (m, n), generator=generator) * 2 - 1
        made[f"Laplace {m}x{n}"] = torch.empty(m, n).exponential_(generator=generator) * signs
    return made


def measure(
    matrices: Mapping[str, Tensor],
    codecs: Sequence[str] = CODECS,
    *,
    rounds: int = 5,
    note: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Measure every codec and the reference on every matrix; they take turns, so that a change of load affects all alike.

    Args:
        matrices: name -> (m, n), float32.
        codecs: textual forms. Default: CODECS.
        rounds: timed turns after one that is not timed. Default: 5.
        note: called with the name of what was measured, after each turn of each codec.

    Raises:
        UsageError: no round, or a codec that does not parse.

    >>> [row.codec for row in measure({"ones": torch.ones(4, 4)}, ["float32"], rounds=1)]
    ['DeMo, plain', 'float32']
    """
    if rounds < 1:
        raise UsageError(f"bench codec: rounds is {rounds}; at least one is needed")
    parsed = [parse(text) for text in codecs]
    rows = []
    for name, x in matrices.items():
        shape = (x.shape[0], x.shape[1])
        peers = {REFERENCE: None} | {str(codec): codec for codec in parsed}
        times: dict[str, list[tuple[float, float]]] = {codec: [] for codec in peers}
        found: dict[str, tuple[int, float]] = {}
        for _ in range(1 + rounds):
            for codec, peer in peers.items():
                encode_s, decode_s, num_bytes, decoded = _turn(peer, x)
                times[codec].append((encode_s, decode_s))
                found[codec] = (num_bytes, _relative_error(decoded, x))
                note(f"{codec} on {name}")
        bounds = {str(codec): entropy_bits(codec, shape) / max(x.numel(), 1) for codec in parsed}
        for codec in peers:
            rows.append(_row(name, shape, codec, found[codec], bounds.get(codec, math.nan), times))
    return rows


def _row(
    name: str,
    shape: tuple[int, int],
    codec: str,
    found: tuple[int, float],
    bound_bits: float,
    times: Mapping[str, Sequence[tuple[float, float]]],
) -> Measurement:
    own, reference = times[codec][1:], times[REFERENCE][1:]
    numel = math.prod(shape)
    encode_s, decode_s = (statistics.median(t[i] for t in own) for i in (0, 1))
    ratios = [
        statistics.median(theirs[i] / ours[i] for theirs, ours in zip(reference, own, strict=True))
        for i in (0, 1)
    ]
    return Measurement(
        input=name,
        shape=shape,
        codec=codec,
        num_bytes=found[0],
        bits=8 * found[0] / numel,
        bound_bits=bound_bits,
        error=found[1],
        encode_s=encode_s,
        decode_s=decode_s,
        encode_mb_s=4e-6 * numel / encode_s,
        decode_mb_s=4e-6 * numel / decode_s,
        encode_ratio=ratios[0],
        decode_ratio=ratios[1],
    )


def _turn(peer: Pipeline | None, x: Tensor) -> tuple[float, float, int, Tensor]:
    """Seconds to encode and to decode, bytes, and the decoded matrix of one codec; of the reference for None."""
    start = time.perf_counter()
    message: Any = demo_encode(x) if peer is None else (peer.encode(x),)
    middle = time.perf_counter()
    decoded = demo_decode(message, (x.shape[0], x.shape[1])) if peer is None else peer.decode(message[0])
    return middle - start, time.perf_counter() - middle, sum(map(len, message)), decoded


def _relative_error(decoded: Tensor, x: Tensor) -> float:
    wide = x.double()
    return float((wide - decoded).norm() / wide.norm().clamp(min=torch.finfo(torch.float64).tiny))
