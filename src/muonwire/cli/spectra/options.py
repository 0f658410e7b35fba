"""Options that several actions of `muonwire spectra` take, and what they do with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from transformers.utils import logging

from muonwire.errors import UsageError
from muonwire.pages import Page, render_page, write_png
from muonwire.spectra.likeness import text_windows
from muonwire.spectra.models import Opened, open_model
from muonwire.spectra.talk import PROMPTS, Answer, Sampling, answer
from muonwire.tasks.text import read_text

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where models are computed, and in what.

    Args:
        device: such as cpu or cuda. Default: an accelerator where there is one.
        dtype: float32, bfloat16, float16 or float64. Default: what the weights are stored in; float32 for GGUF.
    """

    device: str | None = None
    dtype: str | None = None

    def open(self, name: str) -> Opened:
        """Load the model of that name, without the progress bars of transformers."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"spectra: dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            device = None if self.device is None else str(torch.device(self.device))
        except RuntimeError as error:
            raise UsageError(
                f"spectra: device is {self.device!r}; it takes cpu, cuda, cuda:1 or mps"
            ) from error
        return open_model(
            name, device=device, dtype=None if self.dtype is None else getattr(torch, self.dtype)
        )


@dataclass(frozen=True, kw_only=True)
class TextChoice:
    """What text is predicted, and what is asked.

    Args:
        text: files of your own. Default: the King James text.
        windows: stretches of the text, spread evenly over it.
        length: tokens of each.
        prompts: what is asked.
    """

    text: tuple[Path, ...] = ()
    windows: int = 8
    length: int = 256
    prompts: tuple[str, ...] = PROMPTS

    def __post_init__(self) -> None:
        if self.windows < 1 or self.length < 2 or not self.prompts:
            raise UsageError(
                f"spectra: windows is {self.windows}, length {self.length}, prompts {len(self.prompts)}; at least 1, 2 and 1 are "
                "wanted"
            )

    @property
    def about(self) -> str:
        """The text's name."""
        return ", ".join(p.name for p in self.text) or "the King James text"

    def token_windows(self, opened: Opened) -> Tensor:
        """(windows, length) token ids of the text, as this model's tokenizer has it."""
        text = read_text(self.text).decode(errors="replace")
        return text_windows(opened, text, windows=self.windows, length=self.length)

    def answers(
        self, opened: Opened, sampling: Sampling, step: Callable[[str], None], *, label: str
    ) -> list[Answer]:
        """A model's answers to all prompts.

        Args:
            opened: the model.
            sampling: how its tokens are chosen.
            step: called with the label and the prompt before each answer.
            label: what the model is called there.
        """
        answers = []
        for prompt in self.prompts:
            step(f"{label}: {prompt}")
            answers.append(answer(opened, prompt, sampling))
        return answers

    def facts(self, sampling: Sampling) -> list[str]:
        """How text was predicted and answers were chosen, for the page."""
        greedy = sampling.temperature == 0
        choice = "the most likely token" if greedy else f"temperature {sampling.temperature}"
        return [
            f"{self.windows} windows of {self.length} tokens of {self.about}",
            f"answers of at most {sampling.max_tokens} tokens, {choice}, seed {sampling.seed}",
        ]


def check_count(models: Sequence[str], count: int, *, action: str) -> None:
    """Raise UsageError where fewer than ``count`` models are named."""
    if len(models) < count:
        raise UsageError(
            f"spectra {action}: {len(models)} models are named; at least {count} wanted, such as `muonwire spectra {action} "
            f"{' '.join(['smollm2', 'runs/spectra/edited'][:count])}`"
        )


def labels_of(models: Sequence[Opened]) -> list[str]:
    """A short name for each model: its label, or its whole name where two share a label."""
    labels = [model.label for model in models]
    return labels if len(set(labels)) == len(labels) else [model.name for model in models]


def write_page(page: Page, path: Path) -> None:
    """Write the page, and each of its charts as a PNG beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(page), encoding="utf-8")
    for chart in page.charts:
        write_png(chart, path.parent)
