"""A model through torch.compile."""

import os
import shutil
from typing import Any

import torch
from torch import nn

from muonwire.errors import UsageError

CACHE = "TORCHINDUCTOR_CACHE_DIR"
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
    _keep_caches_apart()
    return torch.compile(model, dynamic=False)


def _keep_caches_apart() -> None:
    """A cache for each instruction set, unless one was chosen: code compiled under another one is wrong or crashes the process."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch itself writes its default into the variable once it has used it.
    default = default_cache_dir()
    if os.environ.get(CACHE, default) == default:
        os.environ[CACHE] = f"{default}_{torch.backends.cpu.get_cpu_capability().lower()}"
