"""The claims that there are: the lab's own and those of files of the user's."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from muonwire.errors import UsageError
from muonwire.lab import claims as own
from muonwire.lab.claim import Claim


def load_claims(files: Sequence[Path] = ()) -> dict[str, Claim]:
    """Every claim by its id: those of ``muonwire.lab.claims`` in the order of their files' names, then those of ``files``.

    Args:
        files: Python files that define ``CLAIM``, or several in ``CLAIMS``.

    Raises:
        UsageError: a file that is not there or defines neither, or an id that is there twice.
    """
    modules = [
        importlib.import_module(f"{own.__name__}.{found.name}")
        for found in sorted(pkgutil.iter_modules(own.__path__), key=lambda m: m.name)
    ]
    modules += [_from_file(path) for path in files]
    claims: dict[str, Claim] = {}
    for module in modules:
        declared = getattr(module, "CLAIMS", None) or (module.CLAIM,)
        for claim in declared:
            if claim.id in claims:
                raise UsageError(
                    f"lab: two claims are named {claim.id}; give the one in {module.__file__} another id"
                )
            claims[claim.id] = claim
    return claims


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


def _from_file(path: Path):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location(f"claim_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UsageError(f"lab: {path} is not a Python file; give one that defines CLAIM")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "CLAIM") and not hasattr(module, "CLAIMS"):
        raise UsageError(f"lab: {path} defines neither CLAIM nor CLAIMS")
    return module
