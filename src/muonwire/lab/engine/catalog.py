"""The claims that there are: the lab's own and those of files of the user's."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from muonwire.errors import UsageError
from muonwire.lab.engine.claim import Claim

# Imported by name: the engine knows no claim.
OWN_CLAIMS = "muonwire.lab.claims"


def load_claims(files: Sequence[Path] = ()) -> dict[str, Claim]:
    """Every claim by its id: those of ``muonwire.lab.claims`` in the order of their ids, then those of ``files``.

    Args:
        files: Python files that define ``CLAIM``, or several in ``CLAIMS``.

    Raises:
        UsageError: a file that is not there or defines neither, or an id that is there twice.
    """
    package = importlib.import_module(OWN_CLAIMS)
    found = pkgutil.walk_packages(package.__path__, prefix=f"{OWN_CLAIMS}.")
    own = [c for m in found if not m.ispkg for c in _declared(importlib.import_module(m.name))]
    own.sort(key=lambda claim: claim.id)
    claims: dict[str, Claim] = {}
    for claim in [*own, *(c for path in files for c in _from_file(path))]:
        if claim.id in claims:
            raise UsageError(f"lab: two claims are named {claim.id}; give the one of yours another id")
        claims[claim.id] = claim
    return claims


def matter_most(claims: Sequence[Claim]) -> dict[str, Claim]:
    """Those of ``claims`` that matter most to somebody who trains, by the question that each answers, in that order."""
    by_id = {claim.id: claim for claim in claims}
    questions: dict[str, str] = importlib.import_module(OWN_CLAIMS).MATTER_MOST
    return {question: by_id[claim] for question, claim in questions.items() if claim in by_id}


def choose(claims: dict[str, Claim], ids: Sequence[str]) -> list[Claim]:
    """The claims of these ids, or of a whole family such as "conflict"; all where none is given.

    Raises:
        UsageError: an id that is not there.
    """
    if not ids:
        return list(claims.values())
    chosen: dict[str, Claim] = {}
    for wanted in ids:
        found = {i: c for i, c in claims.items() if i == wanted or i.split(".")[0] == wanted}
        if not found:
            raise UsageError(
                f"lab: no claim {wanted!r}; allowed are {', '.join(claims)}, and the word before the point"
            )
        chosen |= found
    return list(chosen.values())


def _declared(module: ModuleType) -> tuple[Claim, ...]:
    declared: tuple[Claim, ...] = getattr(module, "CLAIMS", None) or (module.CLAIM,)
    return declared


def _from_file(path: Path) -> tuple[Claim, ...]:
    spec = importlib.util.spec_from_file_location(f"claim_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UsageError(f"lab: {path} is not a Python file; give one that defines CLAIM")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except TypeError as error:
        if "'source'" not in str(error):
            raise
        raise UsageError(
            f"lab: {path} gives a claim a source; leave it out, or give note=Note(title=..., about=...) from muonwire.lab instead"
        ) from error
    if not hasattr(module, "CLAIM") and not hasattr(module, "CLAIMS"):
        raise UsageError(f"lab: {path} defines neither CLAIM nor CLAIMS")
    return _declared(module)
