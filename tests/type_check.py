"""mypy on small files, as a user of the library runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def type_check(*files):
    """What `mypy --strict` says of the files, an error or a note a line, without the folders.

    The cache is that of `make check`, in which torch is known already.
    """
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *map(str, files)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": f"src:{files[0].parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    for file in files:
        lines = [line.replace(str(file), file.name) for line in lines]
    return lines
