"""Singular values as a curve over their places, as rows and as a plot."""

from collections.abc import Mapping

import torch
from torch import Tensor

from muonwire.lab import Plot, Row, Value

# 0 is the largest singular value, 1 the smallest.
PLACES = tuple(i / 10 for i in range(11))


def spectrum_rows(x: Tensor, where: Mapping[str, Value], *, over_largest: bool = True) -> list[Row]:
    """The singular values of ``x`` at ``PLACES``.

    Args:
        x: (m, n), not zero.
        where: the columns that say what it is.
        over_largest: divide by the largest one. Default: True.
    """
    values = torch.linalg.svdvals(x)
    unit = values[0] if over_largest else torch.ones_like(values[0])
    last = len(values) - 1
    return [{**where, "place": p, "singular": float(values[round(p * last)] / unit)} for p in PLACES]


def spectrum_plot(
    name: str,
    *,
    title: str,
    series: tuple[str, str],
    remark: str = "",
    select: Mapping[str, Value] | None = None,
) -> Plot:
    """The plot of ``spectrum_rows`` over the largest value.

    Args:
        name, title, series: as ``Plot`` has them.
        remark: goes behind how to read it. Default: nothing.
        select: the rows that take part. Default: all.
    """
    how_to_read = "Over the largest one; 0 on the left is the largest, 1 on the right the smallest."
    return Plot(
        name=name,
        title=title,
        how_to_read=f"{how_to_read} {remark}".rstrip(),
        x=("place", "place among the singular values"),
        y=("singular", "singular value over the largest"),
        series=series,
        log_y=True,
        select=select or {},
    )
