"""How well a language model predicts real text, and how much it agrees with another one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.spectra.models import Opened


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """A model on windows of real text.

    Args:
        loss: mean −log p of the next token, in nats.
        kl: mean Kullback–Leibler divergence Σ p log(p/q) of the next-token distributions, p of the original and q of this model,
            in nats; 0 for the original.
        agreement: how often both find the same token the most likely, in [0, 1].
        num_tokens: how many were predicted.
    """

    loss: float
    kl: float
    agreement: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite above the range of floats."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def text_windows(opened: Opened, text: str, *, windows: int, length: int) -> Tensor:
    """(windows, length) token ids, spread evenly over a text.

    Raises:
        UsageError: the model has no tokens, or the text is too short.
    """
    if opened.tokens is None:
        raise UsageError(
            f"model: {opened.name} has no tokenizer, so that no text can be given to it; put one into its folder"
        )
    # Only the part of the text that a window needs is tokenized: 16 characters a token are more than enough.
    ids: list[int] = []
    every = max(len(text) // windows, 1)
    for start in range(0, every * windows, every):
        part = opened.tokens.encode(text[start : start + min(every, 16 * length)])[:length]
        if len(part) < length:
            raise UsageError(
                f"text: {len(text)} characters do not give {windows} windows of {length} tokens; give a longer text, or fewer or "
                "shorter windows"
            )
        ids += part
    return torch.tensor(ids).view(windows, length)


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """log p (length − 1, vocabulary) of each next token, float32, for one window (length,)."""
    place = next(model.parameters()).device
    logits = model(input_ids=ids[None].to(place)).logits[0, :-1]
    found: Tensor = logits.float().log_softmax(-1).cpu()
    return found


class Reference:
    """The original's predictions on windows, computed once for many comparisons.

    Args:
        opened: the original.
        windows: (windows, length) token ids; 4 bytes are kept for each token of the vocabulary at each place.
    """

    def __init__(self, opened: Opened, windows: Tensor) -> None:
        self.windows = windows
        self._kept = [log_probabilities(opened.model, ids) for ids in windows]
        self.itself = self.compare(opened.model)

    def compare(self, model: nn.Module) -> Likeness:
        """A model against the original.

        Raises:
            UsageError: the vocabularies differ.
        """
        loss = kl = agreed = 0.0
        count = 0
        for ids, log_p in zip(self.windows, self._kept, strict=True):
            log_q = log_probabilities(model, ids)
            if log_q.shape != log_p.shape:
                raise UsageError(
                    f"compare: vocabularies of {log_p.shape[1]} and {log_q.shape[1]} tokens have no distributions in common; "
                    "compare models of one tokenizer"
                )
            loss -= float(log_q.gather(1, ids[1:, None]).double().sum())
            kl += float((log_p.exp() * (log_p - log_q)).nan_to_num(nan=math.inf).double().sum())
            agreed += int((log_q.argmax(1) == log_p.argmax(1)).sum())
            count += len(log_q)
        return Likeness(
            loss=loss / count if math.isfinite(loss) else math.inf,
            kl=max(kl / count, 0.0),
            agreement=agreed / count,
            num_tokens=count,
        )


def losses(models: Sequence[Opened], windows: Tensor) -> list[Likeness]:
    """Each model against the first."""
    reference = Reference(models[0], windows)
    return [reference.itself, *(reference.compare(m.model) for m in models[1:])]
