"""How much a selection chooses: a number of items, or a share of them."""

from muonwire.errors import UsageError


def check_amount(name: str, *, k: int | None, density: float | None) -> None:
    """Raise UsageError unless exactly one of ``k`` and ``density`` is given, and it is possible."""
    if (k is None) == (density is None):
        raise UsageError(f"{name}: k is {k} and density is {density}; give exactly one of them")
    if k is not None and (not isinstance(k, int) or k < 1):
        raise UsageError(f"{name}: k is {k}; it must be an integer of at least 1")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"{name}: density is {density}; it must lie in (0, 1]")


def amount(numel: int, *, k: int | None, density: float | None) -> int:
    """How many of ``numel`` items: ``k``, or the share ``density`` of them and at least one; never more than there are.

    >>> amount(10, k=None, density=0.25), amount(10, k=None, density=0.01), amount(10, k=12, density=None)
    (2, 1, 10)
    """
    if k is None:
        assert density is not None
        k = max(1, round(density * numel))
    return min(numel, k)
