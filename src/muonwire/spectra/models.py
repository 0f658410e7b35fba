"""Opening a trained model: from the hub, a folder, a GGUF file, or a checkpoint of muonwire."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.tasks import TASKS
from muonwire.tasks.pretrained import FORMS as MODEL_FORMS
from muonwire.tasks.pretrained import PACKAGED as PACKAGED
from muonwire.tasks.pretrained import Place, find_model, load_model, load_tokenizer, named_tokenizer
from muonwire.tasks.text import BYTES
from muonwire.train.checkpoint import MANIFEST, latest

WEIGHTS = "model.safetensors"
FORMS = f"a run of `muonwire train` or one of its checkpoints, {MODEL_FORMS}"


class Tokens(ABC):
    """Text to token ids and back."""

    @property
    @abstractmethod
    def end(self) -> int | None:
        """The token that ends a generation, if there is one."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    @abstractmethod
    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation up to where the model answers; of the last message alone without a chat template."""


class ByteTokens(Tokens):
    """Each byte is a token, as in models that ``muonwire train`` makes without a tokenizer."""

    @property
    @override
    def end(self) -> int | None:
        return None

    @override
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    @override
    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode(messages[-1]["content"])


class HubTokens(Tokens):
    """A tokenizer of ``transformers``.

    Args:
        load: makes the tokenizer, when it is first needed.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of ``transformers``."""
        return self._load()

    @property
    @override
    def end(self) -> int | None:
        found: int | None = self.tokenizer.eos_token_id
        return found

    @override
    def encode(self, text: str) -> list[int]:
        # A long text is cut into windows later; the tokenizer's warning about its length would mislead.
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    @override
    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @override
    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.encode(messages[-1]["content"])
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return ids


@dataclass(kw_only=True)
class Opened:
    """A model with its tokenizer and where it came from.

    Args:
        name: as the user gave it.
        model: in evaluation mode, on ``device``.
        tokens: its tokenizer; None where it has none.
        source: the folder with its tokenizer and settings; None where there is none.
        gguf: name of the GGUF file in ``source``; None for other forms.
    """

    name: str
    model: nn.Module
    tokens: Tokens | None = None
    source: Path | None = None
    gguf: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def label(self) -> str:
        """A short name for tables and charts."""
        path = Path(self.name)
        if path.name.startswith("step_"):
            run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
            return f"{run.name} step {int(path.name.removeprefix('step_'))}"
        return path.stem if path.suffix == ".gguf" else path.name


def open_model(name: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> Opened:
    """Open a trained model.

    Args:
        name: a folder with ``config.json`` and safetensors, a GGUF file, a run of ``muonwire train`` or one of its checkpoints, a
            hub name, or "smollm2".
        device: where the model is put. Default: an accelerator where there is one, else the CPU.
        dtype: of the weights. Default: the one they are stored in; float32 for GGUF, whose blocks are decoded.

    Raises:
        UsageError: there is no such model, or it cannot be read.
    """
    opened = _open(name, dtype)
    place = device or (
        str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    )
    opened.model.to(place).eval()
    for param in opened.model.parameters():
        param.requires_grad_(True)
    return opened


def _open(name: str, dtype: torch.dtype | None) -> Opened:
    path = Path(name)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return _checkpoint(name, path, dtype)
        newest = latest(path)
        if newest is not None:
            return _checkpoint(str(newest), newest, dtype)
    place = find_model(name, forms=FORMS)
    if place.scratch:
        raise UsageError(f"model: {name} is no model, and has no weights; wanted is {FORMS}")
    return _pretrained(place, dtype)


def _pretrained(place: Place, dtype: torch.dtype | None) -> Opened:
    model = load_model(place, dtype=dtype, forms=FORMS)
    tokens: Tokens | None = None
    if place.gguf is not None:
        # Reading it takes as long as reading the weights, so it is left until it is needed; a GGUF file always has one.
        tokens = HubTokens(lambda: load_tokenizer(place))
    else:
        with suppress(UsageError):
            found = load_tokenizer(place)
            tokens = HubTokens(lambda: found)
    if tokens is None and model.config.get_text_config().vocab_size == 256:  # type: ignore[operator,union-attr]
        tokens = ByteTokens()
    source = place.at if isinstance(place.at, Path) else None
    return Opened(name=place.name, model=model, tokens=tokens, source=source, gguf=place.gguf)


def _checkpoint(name: str, path: Path, dtype: torch.dtype | None) -> Opened:
    from safetensors.torch import load_file

    manifest = json.loads((path / MANIFEST).read_text())
    task = manifest["identity"]["task"]
    if task["kind"] not in TASKS:
        raise UsageError(
            f"model: {name} is of the task {task['kind']!r}, which is not among {', '.join(TASKS)}; add it to muonwire.tasks.TASKS"
        )
    model = TASKS[task["kind"]].read(manifest["identity"]["config"]["task"]).saved_model(task)
    tokenizer = task.get("tokenizer")
    tokens: Tokens | None = ByteTokens() if tokenizer == BYTES else _text_tokens(tokenizer, task["model"])
    weights = load_file(path / WEIGHTS)
    # What was not trained, such as the model below adapters, comes from where the run had it.
    missing = [n for n, p in model.named_parameters() if p.requires_grad and n not in weights]
    if missing:
        raise UsageError(
            f"model: {name} lacks {missing[0]} and {len(missing) - 1} more of its model's weights"
        )
    model.load_state_dict(weights, strict=False)
    merge = getattr(model, "merge_and_unload", None)
    model = model if merge is None else merge()
    return Opened(name=name, model=model if dtype is None else model.to(dtype), tokens=tokens)


def _text_tokens(tokenizer: str | None, model: str) -> Tokens | None:
    if tokenizer is None:
        return None
    if tokenizer == model:
        place = find_model(model)
        return HubTokens(lambda: load_tokenizer(place))
    loaded = named_tokenizer(tokenizer)
    return HubTokens(lambda: loaded)
