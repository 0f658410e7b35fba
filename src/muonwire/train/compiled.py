"""A model through torch.compile."""

import getpass
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muonwire.errors import UsageError

# What torch looks for on Linux and macOS.
COMPILERS = ("g++", "clang++")


def compiled(model: nn.Module, device: torch.device) -> Any:
    """The model's call, compiled for the shapes it sees; the parameters stay the model's.

    Args:
        model: on ``device``.
        device: a CPU needs a C++ compiler.

    Raises:
        UsageError: there is none.
    """
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else COMPILERS
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise UsageError(
            f"compile: no C++ compiler was found ({', '.join(names)}); install one, name it in CXX, or leave out --compile"
        )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _cache_dir())
    return torch.compile(model, dynamic=False)


def _cache_dir() -> str:
    """One for each instruction set: code that was compiled and cached under another one crashes the process."""
    widest = torch.backends.cpu.get_cpu_capability().lower()
    return str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{widest}")
