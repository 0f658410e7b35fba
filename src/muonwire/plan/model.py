"""The model that is planned for: shapes without values, of a number of parameters or of a model by its name."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muonwire.errors import UsageError
from muonwire.tasks import MODEL_SIZES, build_llama
from muonwire.tasks.base import Task

# A number alone is taken as about so many square matrices, whose sides are powers of two within these bounds.
STAND_IN_MATRICES = 64
SMALLEST_SIDE, LARGEST_SIDE = 16, 1 << 14
BYTE_VOCABULARY = 256
LARGEST_NUMBER = 1e14


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model, of which shapes and dtypes are read alone; on the meta device where nothing trains it.

    Args:
        module: its parameters.
        about: what it is, in words.
        preset: of `muonwire train --model-size`, if it is one. Default: none.
    """

    module: nn.Module
    about: str
    preset: str | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trainable parameters, tied ones once."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def num_parameters(self) -> int:
        """All trainable parameters."""
        return sum(p.numel() for p in self.trained)

    @property
    def num_in_matrices(self) -> int:
        """Those of tensors of two or more dimensions."""
        return sum(p.numel() for p in self.trained if p.ndim >= 2)


def read_model(text: str) -> PlannedModel:
    """The model of a number such as "124e6", a preset such as "nano", or a name or folder that ``transformers`` knows.

    Of a name only the configuration is read; no weights are loaded. A number N is taken as square matrices of one size, and what
    remains as one vector, since codecs count entries, and little else.

    Raises:
        UsageError: it is none of these, or no positive number.

    >>> model = read_model("1e6")
    >>> model.num_parameters, model.num_in_matrices
    (1000000, 999424)
    """
    number = _number(text)
    if number is not None:
        return _stand_in(number)
    if text in MODEL_SIZES:
        with torch.device("meta"):
            module = build_llama(text, vocabulary=BYTE_VOCABULARY, sequence=64, seed=0)
        return PlannedModel(
            module=module, about=f"{text}, a Llama of `muonwire train` that reads bytes", preset=text
        )
    return PlannedModel(module=_from_config(text), about=text)


def of_task(task: Task) -> PlannedModel:
    """The model of a task, with values."""
    return PlannedModel(module=task.build_model(seed=0), about=task.about.model)


def _number(text: str) -> int | None:
    try:
        value = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        return None
    if not 1 <= value <= LARGEST_NUMBER:
        raise UsageError(f"plan: parameters is {text}; their number lies between 1 and {LARGEST_NUMBER:.0e}")
    return round(value)


def _stand_in(number: int) -> PlannedModel:
    side = 2 ** round(math.log2(max(number / STAND_IN_MATRICES, 1.0)) / 2)
    side = min(max(side, SMALLEST_SIDE), LARGEST_SIDE)
    count, rest = divmod(number, side * side)
    if not count:
        raise UsageError(
            f"plan: parameters is {number}; at least {SMALLEST_SIDE**2} make a matrix, and recipes of Muon need one"
        )
    with torch.device("meta"):
        module = nn.Module()
        module.layers = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(count))
        if rest:
            module.scale = nn.Parameter(torch.empty(rest))
    return PlannedModel(
        module=module, about=f"{number:,} parameters, taken as {count} matrices of {side}x{side}"
    )


def _from_config(text: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        config: Any = AutoConfig.from_pretrained(text)
        with torch.device("meta"):
            try:
                module: nn.Module = AutoModelForCausalLM.from_config(config)
            except ValueError:
                module = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "a folder without a model's config.json" if Path(text).is_dir() else "no model that is known"
        raise UsageError(
            f"plan: parameters is {text!r}, {where} ({str(error).splitlines()[0][:120]}); give a number such as 124e6, "
            f"one of {', '.join(MODEL_SIZES)}, a folder with config.json, or a hub name that this machine can reach"
        ) from error
    return module
