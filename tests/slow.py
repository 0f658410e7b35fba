"""Cases that `make test` leaves out and `make test-slow` runs, because others of the suite go the same ways through the code."""

import pytest


def slow_unless(kept, cases, ids=None):
    """The cases, with the marker ``slow`` on those for which ``kept(index, *case)`` is false.

    ``ids`` is a function of the values of a case. Default: pytest's own.
    """
    return [
        pytest.param(
            *case,
            marks=() if kept(index, *case) else pytest.mark.slow,
            id=None if ids is None else ids(*case),
        )
        for index, case in enumerate(cases)
    ]
