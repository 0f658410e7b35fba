"""Float32 products at the full width of AMD's processors.

On processors that are not Intel's, the MKL in torch's wheels multiplies float32 with AVX2 even where AVX-512 is there: 100 GFLOP/s
instead of 230 on a core of Zen 5. It asks a function of its own whether the processor is Intel's; a library loaded first that
answers yes gives the wider instructions. Sums are then added in another order, so that results differ by rounding.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from muonwire.errors import UsageError

SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
LIBRARY = "libwide_products.so"
COMPILERS = ("cc", "gcc", "clang")
PRELOAD = "LD_PRELOAD"


def are_wide() -> bool:
    """Whether this process was started with the library."""
    return LIBRARY in os.environ.get(PRELOAD, "")


def lacking() -> str:
    """Why the library would do nothing here, or could not be made; empty where it helps."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    if "AuthenticAMD" not in text:
        return "the processor is not AMD's"
    if " avx512f" not in text:
        return "the processor has no AVX-512"
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return "this torch multiplies without MKL"
    return "" if _compiler() else f"there is no C compiler ({', '.join(COMPILERS)})"


def _compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def library(folder: Path) -> Path:
    """The library in ``folder``, which is made if it is not there.

    Raises:
        UsageError: it cannot be made.
    """
    path = folder.absolute() / LIBRARY
    compiler = _compiler()
    if not path.exists():
        if compiler is None:
            raise UsageError(
                f"scale: there is no C compiler ({', '.join(COMPILERS)}); leave out --wide-products"
            )
        folder.mkdir(parents=True, exist_ok=True)
        source, partial = path.with_suffix(".c"), path.with_suffix(".partial")
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(partial), str(source)], check=True)
        partial.replace(path)
    return path


def environment(folder: Path) -> dict[str, str]:
    """This process's environment with the library."""
    preload = [str(library(folder)), *filter(None, [os.environ.get(PRELOAD)])]
    return {**os.environ, PRELOAD: ":".join(preload)}


def widen(folder: Path, module: str, arguments: Sequence[str]) -> None:
    """Start this program anew with the library, unless it was started so.

    Args:
        folder: of the library.
        module: that is this program.
        arguments: of it.

    Raises:
        UsageError: it would do nothing here.
    """
    if are_wide():
        return
    if lacks := lacking():
        raise UsageError(f"scale: --wide-products does nothing here, since {lacks}; leave it out")
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment(folder))
