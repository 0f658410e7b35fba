"""Measuring claims: repeats that are kept, side by side up to the cores."""

import hashlib
import json
import math
import multiprocessing
import os
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muonwire.errors import UsageError
from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.engine.check import Row
from muonwire.lab.engine.claim import Claim, Setting
from muonwire.spectra.models import PACKAGED
from muonwire.tasks import TextSettings
from muonwire.train.checkpoint import write_json
from muonwire.train.launch import start_method

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """Settings of the lab.

    Args:
        ids: claims such as conflict.1, or families such as conflict. Default: all.
        out: folder of measurements, inputs and the page.
        quick: one seed, and sizes and steps as small as a test wants them; no evidence.
        jobs: measurements side by side. Default: the number of cores.
        claims_from: Python files with claims of your own.
        language_model: the pretrained model whose gradients are measured; see ``spectra.models.open_model``.
    """

    ids: tuple[str, ...] = ()
    out: Path = Path("runs/lab")
    quick: bool = False
    jobs: int | None = None
    claims_from: tuple[Path, ...] = ()
    language_model: str = PACKAGED

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"lab: jobs is {self.jobs}; at least 1 is needed")


def repeat_file(out: Path, claim: Claim, seed: int) -> Path:
    """Where one repeat's rows are kept."""
    return out / "claims" / claim.id / f"seed={seed}.json"


def identity(claim: Claim, seed: int, *, quick: bool) -> dict[str, Any]:
    """What a kept repeat must have been measured with to count."""
    made = {i.name: i.made_with(quick) for i in claim.inputs}
    digests = {name: digest(about) for name, about in made.items() if about}
    kept = {"claim": claim.id, "version": claim.version, "seed": seed, "quick": quick}
    return {**kept, "inputs": digests} if digests else kept


def digest(about: object) -> str:
    """Of what an input is made with, so that measurements on another one do not count."""
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_repeat(out: Path, claim: Claim, seed: int, *, quick: bool) -> dict[str, Any] | None:
    """A kept repeat, or None where it is missing or of another version."""
    try:
        kept: dict[str, Any] = json.loads(repeat_file(out, claim, seed).read_text())
    except (OSError, ValueError):
        return None
    return kept if kept.get("identity") == identity(claim, seed, quick=quick) else None


def repeats_of(claim: Claim, *, quick: bool) -> range:
    """The seeds of a claim; the first alone where it is quick."""
    return range(1 if quick else claim.repeats)


def measure(claim: Claim, seed: int, *, out: Path, quick: bool) -> None:
    """Measure one repeat and keep it.

    Raises:
        UsageError: the measurement gave no rows.
    """
    start_s = time.perf_counter()
    rows = list(claim.measure(Setting(seed=seed, quick=quick, folder=out, inputs=claim.inputs)))
    if not rows:
        raise UsageError(f"claim {claim.id}: its measurement gave no rows")
    path = repeat_file(out, claim, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "identity": identity(claim, seed, quick=quick),
            "took_s": time.perf_counter() - start_s,
            "threads": torch.get_num_threads(),
            "machine": machine(),
            "rows": [{"seed": seed, **{k: _plain(v) for k, v in row.items()}} for row in rows],
        },
    )


def machine() -> str:
    """What measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    return f"{platform.machine()}, {device}, torch {torch.__version__}"


def rows_of(claim: Claim, *, out: Path, quick: bool) -> tuple[list[Row], float]:
    """The rows of all kept repeats, and the seconds that they took."""
    kept = [read_repeat(out, claim, seed, quick=quick) for seed in repeats_of(claim, quick=quick)]
    return [row for k in kept if k for row in k["rows"]], sum(k["took_s"] for k in kept if k)


def run(config: LabConfig, claims: Sequence[Claim], *, say: Say = print) -> dict[str, str]:
    """Measure what is missing of ``claims``; repeats that are there are kept.

    Claims that measure time run by themselves, after the others. A claim that fails does not stop the others.

    Args:
        config: the settings.
        claims: which ones.
        say: gets a line of text for each finished repeat.

    Returns:
        The failures: by claim, the error with its place.

    Raises:
        UsageError: ``out`` holds measurements of another language model.
    """
    out, quick = config.out, config.quick
    # Also where every repeat is kept: it would be shown as if it were the other model's.
    for one in dict.fromkeys(i for claim in claims for i in claim.inputs):
        one.check_model(out, quick=quick, model=config.language_model)
    missing = [
        (c, seed)
        for c in claims
        for seed in repeats_of(c, quick=quick)
        if read_repeat(out, c, seed, quick=quick) is None
    ]
    failures: dict[str, str] = {}
    for one in dict.fromkeys(i for claim, _ in missing for i in claim.inputs):
        say(f"input {one.name}")
        one.prepare(out, quick=quick, model=config.language_model)
    beside = [(c, s) for c, s in missing if not c.alone]
    jobs = min(config.jobs or os.cpu_count() or 1, len(beside))
    if jobs > 1:
        _side_by_side(beside, jobs, config, failures, say)
    alone = beside if jobs == 1 else []
    alone += [(c, s) for c, s in missing if c.alone]
    for claim, seed in alone:
        _attempt(claim, seed, lambda c=claim, s=seed: measure(c, s, out=out, quick=quick), failures, say)  # type: ignore[misc]
    return failures


def _side_by_side(
    repeats: Sequence[tuple[Claim, int]], jobs: int, config: LabConfig, failures: dict[str, str], say: Say
) -> None:
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context(start_method(TextSettings.modules))
    ) as pool:
        futures: dict[Future[None], tuple[Claim, int]] = {
            pool.submit(_measure_in_worker, claim.id, seed, config): (claim, seed) for claim, seed in repeats
        }
        while futures:
            done, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                claim, seed = futures.pop(future)
                _attempt(claim, seed, future.result, failures, say)


def _measure_in_worker(claim_id: str, seed: int, config: LabConfig) -> None:
    torch.set_num_threads(1)
    measure(load_claims(config.claims_from)[claim_id], seed, out=config.out, quick=config.quick)


def _attempt(claim: Claim, seed: int, call: Callable[[], None], failures: dict[str, str], say: Say) -> None:
    try:
        call()
    except Exception as error:
        # One claim's failure must not cost the others' hours; it is reported at the end, and by the exit code.
        failures[claim.id] = "".join(traceback.format_exception_only(error)).strip()
        say(f"{claim.id} seed {seed}: failed: {failures[claim.id]}")
    else:
        say(f"{claim.id} seed {seed}: measured")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
