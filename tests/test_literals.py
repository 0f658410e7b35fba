import gc
import sys
import threading

import pytest

from muonwire.literals import read_expression, read_literal

DEEP = "[" * 40 + "1" + "]" * 40


class _Slow:
    """Its end runs Python code, in which another thread gets its turn: as collected objects of a training run do."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        sum(range(300))


def test_literals_are_values() -> None:
    assert read_literal(" (1, 'a', None)") == (1, "a", None)
    with pytest.raises(ValueError, match="malformed"):
        read_literal("open('x')")
    with pytest.raises(SyntaxError):
        read_expression("1 +")


def test_threads_that_read_at_once_do_not_disturb_each_other() -> None:
    failed: list[BaseException] = []

    def read(depth: int) -> None:
        if depth:
            return read(depth - 1)
        try:
            for _ in range(60):
                _Slow()
                read_literal(DEEP)
        except SystemError as error:
            failed.append(error)
        return None

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(5)
    try:
        threads = [threading.Thread(target=read, args=(10 * n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
    assert not failed
