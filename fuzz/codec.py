"""Gives every codec payloads that were mutated, truncated, re-ordered or made up: `make fuzz`.

    python -m fuzz.codec --cases 200000
    python -m fuzz.codec --codec 'topk(k=3) | bfloat16' --reproduce runs/fuzz/failure-0.bin

A case passes where it decodes to finite values of the announced shape, or is a PayloadError, within the bound on allocation that
docs/payload.md states and the bound on time. An input whose outcome its codec has not had before (the message without its
numbers) joins the corpus that further inputs are made of. Each codec runs in a process of its own, with a limit on its address
space; one that dies or hangs is reported with the payload it had. Exit code 1 on any failure.
"""

import argparse
import mmap
import multiprocessing
import os
import re
import resource
import shlex
import signal
import struct
import sys
import time
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch
from tests.codec.test_codecs import TEXTS
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fuzz.mutations import Field, Message, mutate, sealed
from muonwire.codec import Codec, parse
from muonwire.codec import payload as payloads
from muonwire.errors import PayloadError

LARGEST_NUMEL = 1 << 13
LARGEST_CORPUS = 400
SLOW_S = 1.0
HANG_S = 20.0
# Beyond what the process has mapped when it starts.
ADDRESS_SPACE_BYTES = 1 << 29
CURRENT_BYTES = 1 << 20
SHAPES = ((64, 96), (5, 7), (16, 8), (33,), (1,), (), (0, 3), (2, 3, 4))
# What differs between two messages of one kind: quoted bytes, numbers, tuples.
_NUMBERS = re.compile(r"""b?'.*'|b?".*"|0x\w+|\(.*\)|-?\d+""")
_DTYPE_CODES = {dtype: code for code, dtype in payloads.DTYPES.items()}


def allowed_bytes(payload: bytes, largest_numel: int = LARGEST_NUMEL) -> int:
    """What docs/payload.md allows a decoder to allocate."""
    return 64 * largest_numel + 256 * len(payload) + (1 << 18)


class Allocated(TorchFunctionMode):
    """The most bytes that tensors returned by PyTorch's functions hold at once; NumPy's and Python's are tracemalloc's."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._num_holders: Counter[int] = Counter()
        # By identity: equality of references is that of their tensors.
        self._references: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self._hold(t)
        return result

    def _hold(self, tensor: Tensor) -> None:
        # A storage lives as long as any of its tensors, views included.
        storage = tensor.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()

        def release(reference: weakref.ref[Tensor]) -> None:
            del self._references[id(reference)]
            self._num_holders[address] -= 1
            if self._num_holders[address] == 0:
                self._live_bytes -= num_bytes

        reference = weakref.ref(tensor, release)
        self._references[id(reference)] = reference
        self._num_holders[address] += 1
        if self._num_holders[address] == 1:
            self._live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)


@dataclass(kw_only=True)
class Outcomes:
    """What became of one codec's cases."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, bytes]] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_share: float = 0.0


def corpus(text: str, random: Random) -> list[Message]:
    """Payloads as the codec writes them: one tensor, many, every dtype."""
    codec, generator = parse(text), torch.Generator().manual_seed(random.randrange(1 << 31))

    def one(shape: tuple[int, ...]) -> Field:
        dtype = random.choice(list(payloads.DTYPES.values()))
        x = torch.randn(shape, generator=generator).to(dtype)
        body = codec.encode_body(x, seed=random.randrange(1 << 32)).body
        return Field(dtype_code=_DTYPE_CODES[dtype], shape=shape, body=body)

    singles = [Message(text=text.encode(), tensors=(one(shape),)) for shape in SHAPES]
    several = [Message(text=text.encode(), tensors=tuple(one(s) for s in SHAPES[i:])) for i in (1, 3, 5)]
    return singles + several + [Message(text=text.encode())]


def decode_all(codec: Codec, payload: bytes, dtype: torch.dtype) -> str:
    """Decode every tensor, and a mean; returns the outcome, and raises AssertionError for a wrong one."""
    entries = payloads.unpack(payload, codec_text=str(codec), largest_numel=LARGEST_NUMEL)
    for entry in entries:
        decoded = codec.decode_body(entry.body, entry.shape)
        assert decoded.shape == entry.shape, f"shape {tuple(decoded.shape)}, {entry.shape} was announced"
        assert decoded.dtype == dtype, f"decoded to {decoded.dtype}, {dtype} is this codec's"
    if len(entries) == 1:
        (entry,) = entries
        mean, bound = codec.bounded_mean([entry.body], entry.shape)
        assert mean.shape == entry.shape, f"mean of shape {tuple(mean.shape)}, {entry.shape} was announced"
        largest = float(mean.abs().max()) if mean.numel() else 0.0
        assert largest <= bound * (1 + 1e-5), f"the mean reaches {largest:g}, {bound:g} was its bound"
        assert bool(codec.decode(payload, largest_numel=LARGEST_NUMEL).isfinite().all()), "not finite"
    return "decoded"


def run_case(codec: Codec, payload: bytes, outcomes: Outcomes, *, dtype: torch.dtype) -> str:
    """One payload, whose tensors decode to ``dtype``; returns its outcome, which is also counted, and failures are kept."""
    start = time.process_time()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    failure = None
    with Allocated() as allocated:
        try:
            outcome = decode_all(codec, payload, dtype)
        except PayloadError as error:
            outcome = "refused: " + _NUMBERS.sub("_", str(error))[:110]
        except Exception as error:
            outcome = failure = f"{type(error).__name__}: {str(error)[:200]}"
    spent_s = time.process_time() - start
    made_bytes = allocated.peak_bytes + tracemalloc.get_traced_memory()[1] - before
    share = made_bytes / allowed_bytes(payload)
    outcomes.slowest_s = max(outcomes.slowest_s, spent_s)
    outcomes.largest_share = max(outcomes.largest_share, share)
    if failure is None and share > 1:
        outcome = failure = f"allocates {made_bytes} bytes, {share:.1f} times what is allowed"
    if failure is None and spent_s > SLOW_S:
        outcome = failure = f"takes {spent_s:.2f} s"
    if failure is not None:
        outcomes.failures.append((failure, payload))
    outcomes.counts[outcome] += 1
    return outcome


def run_codec(
    text: str, *, cases: int, seed: int, note: Callable[[bytes], None] = lambda payload: None
) -> Outcomes:
    """All cases of one codec; ``note`` is called with each payload before it is decoded."""
    codec, random, outcomes = parse(text), Random(f"{seed} {text}"), Outcomes()
    messages, dtype = corpus(text, random), codec.quantize.decoded_dtype
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    try:
        for message in messages:
            payload = sealed(message.rest())
            note(payload)
            if run_case(codec, payload, outcomes, dtype=dtype) != "decoded":
                outcomes.failures.append(("does not decode what the codec itself wrote", payload))
        for _ in range(cases - len(messages)):
            made, payload = mutate(random.choice(messages), random, other=random.choice(messages))
            note(payload)
            known = len(outcomes.counts)
            run_case(codec, payload, outcomes, dtype=dtype)
            if made is not None and len(outcomes.counts) > known and len(messages) < LARGEST_CORPUS:
                messages.append(made)
    finally:
        if started:
            tracemalloc.stop()
    return outcomes


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _in_process(text: str, cases: int, seed: int, current: mmap.mmap, pipe: Connection) -> None:
    if Path("/proc/self/statm").exists():
        limit = _mapped_bytes() + ADDRESS_SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # The default action ends the process, in the middle of a native loop too.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def note(payload: bytes) -> None:
        current[: 4 + len(payload)] = struct.pack("<I", len(payload)) + payload
        signal.setitimer(signal.ITIMER_REAL, HANG_S)

    pipe.send(run_codec(text, cases=cases, seed=seed, note=note))


class Apart:
    """``run_codec`` in a process of its own, so that a crash or a hang is a failure like any other."""

    def __init__(self, text: str, *, cases: int, seed: int) -> None:
        context = multiprocessing.get_context("fork")
        self.current = mmap.mmap(-1, CURRENT_BYTES)
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_in_process, args=(text, cases, seed, self.current, theirs))
        self.process.start()
        theirs.close()

    def outcomes(self) -> Outcomes:
        """Wait for the end."""
        try:
            outcomes: Outcomes = self.pipe.recv()
        except EOFError:
            self.process.join()
            (length,) = struct.unpack_from("<I", self.current)
            code = self.process.exitcode
            what = "hangs" if code == -signal.SIGALRM else f"ends its process ({code})"
            outcomes = Outcomes(failures=[(what, bytes(self.current[4 : 4 + length]))])
            outcomes.counts[what] += 1
        self.process.join()
        return outcomes


def run_all(texts: Sequence[str], *, cases: int, seed: int) -> Iterator[tuple[str, Outcomes]]:
    """Each codec's outcomes, as many at a time as there are processors."""
    jobs = os.cpu_count() or 1
    for i in range(0, len(texts), jobs):
        running = [(text, Apart(text, cases=cases, seed=seed)) for text in texts[i : i + jobs]]
        for text, apart in running:
            yield text, apart.outcomes()


def fuzz(texts: Sequence[str], *, cases: int, seed: int, out: Path) -> int:
    """Run ``cases`` spread evenly over the codecs, print a table, write what fails; returns the exit code."""
    width = max(map(len, texts))
    print(
        f"{'codec'.ljust(width)}    cases  decoded  refused  ways  failed  slowest  allocation of its bound"
    )
    total: Counter[str] = Counter()
    num_failures = 0
    for text, outcomes in run_all(texts, cases=-(-cases // len(texts)), seed=seed):
        refused = {k: n for k, n in outcomes.counts.items() if k.startswith("refused")}
        num_cases, decoded = sum(outcomes.counts.values()), outcomes.counts["decoded"]
        print(
            f"{text.ljust(width)}  {num_cases:7,}  {decoded:7,}  {sum(refused.values()):7,}  {len(refused):4}  "
            f"{len(outcomes.failures):6}  {outcomes.slowest_s * 1e3:4.0f} ms  {outcomes.largest_share:.0%}",
            flush=True,
        )
        total.update(outcomes.counts)
        for what, payload in outcomes.failures[:5]:
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"failure-{num_failures}.bin"
            path.write_bytes(payload)
            num_failures += 1
            command = ["python", "-m", "fuzz.codec", "--codec", text, "--reproduce", str(path)]
            print(f"  {what}\n    {shlex.join(command)}")
        num_failures += len(outcomes.failures[5:])
    print(f"\n{sum(total.values()):,} payloads, {num_failures} failures; outcomes:")
    for outcome, count in total.most_common():
        print(f"{count:9,}  {outcome}")
    return 1 if num_failures else 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200_000, help="payloads over all codecs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="folder for what fails")
    parser.add_argument("--codec", action="append", help="only this codec; may be given again")
    parser.add_argument(
        "--reproduce", type=Path, help="decode this one payload with --codec, and let it raise"
    )
    settings = parser.parse_args(args)
    torch.set_num_threads(1)
    if settings.reproduce is not None:
        for text in settings.codec or TEXTS:
            codec = parse(text)
            print(decode_all(codec, settings.reproduce.read_bytes(), codec.quantize.decoded_dtype))
        return 0
    start = time.perf_counter()
    code = fuzz(settings.codec or TEXTS, cases=settings.cases, seed=settings.seed, out=settings.out)
    print(f"{time.perf_counter() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
