"""Generating text with the same random numbers at the same places for several models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.spectra.models import Opened

PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Why is the sky blue?",
    "Count from one to ten.",
    "In the beginning God created",
)
GRAM = 4


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_tokens: of an answer.
        temperature: of the softmax; 0 takes the most likely token.
        top_p: only the most likely tokens that hold this probability together, in (0, 1].
        seed: of the random numbers, one a token, the same for every model.
    """

    max_tokens: int = 80
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"sampling: max_tokens is {self.max_tokens}, temperature {self.temperature}, top_p {self.top_p}; at least 1, at "
                "least 0 and in (0, 1] are wanted"
            )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of a model.

    Args:
        prompt, text: the prompt and the answer.
        num_tokens: of the answer.
        ended: whether the model ended it by itself.
        repetition: share of its runs of four tokens that occurred in it before, in [0, 1].
    """

    prompt: str
    text: str
    num_tokens: int
    ended: bool
    repetition: float


def stream(opened: Opened, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """The tokens of an answer, one after the other; the token that ends it is not among them."""
    generator = torch.Generator().manual_seed(sampling.seed)
    longest = getattr(opened.model.config, "max_position_embeddings", None)
    context, cache = list(ids), None
    fed = torch.tensor([context[-longest:] if longest else context], device=opened.device)
    ends = _end_tokens(opened)
    for _ in range(sampling.max_tokens):
        with torch.no_grad():
            out = opened.model(input_ids=fed, past_key_values=cache, use_cache=True)
        # Uniform numbers instead of torch.multinomial: two models that agree in distribution then agree in tokens.
        token = _chosen(out.logits[0, -1].float().cpu(), sampling, float(torch.rand((), generator=generator)))
        if token in ends:
            return
        yield token
        context.append(token)
        # Past the longest context the window slides, and a cache would be of another window.
        if longest and len(context) > longest:
            cache, fed = None, torch.tensor([context[-longest:]], device=opened.device)
        else:
            cache, fed = out.past_key_values, torch.tensor([[token]], device=opened.device)


def _end_tokens(opened: Opened) -> set[int]:
    found = {opened.tokens.end} if opened.tokens is not None else set()
    more = getattr(getattr(opened.model, "generation_config", None), "eos_token_id", None)
    found |= set(more) if isinstance(more, list) else {more}
    return {t for t in found if t is not None}


def _chosen(logits: Tensor, sampling: Sampling, uniform: float) -> int:
    if sampling.temperature == 0.0 or not bool(logits.isfinite().all()):
        return int(logits.argmax())
    falling, order = (logits / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    sums = falling.cumsum(-1)
    kept = int((sums - falling < sampling.top_p).sum())
    place = int(torch.searchsorted(sums[:kept], uniform * float(sums[kept - 1])))
    return int(order[min(place, kept - 1)])


def answer(opened: Opened, prompt: str, sampling: Sampling) -> Answer:
    """A model's answer to a prompt, in its chat template where it has one.

    Raises:
        UsageError: the model has no tokenizer, or the prompt is empty.
    """
    ids = prompt_ids(opened, [{"role": "user", "content": prompt}])
    tokens = list(stream(opened, ids, sampling))
    assert opened.tokens is not None
    return Answer(
        prompt=prompt,
        text=opened.tokens.decode(tokens),
        num_tokens=len(tokens),
        ended=len(tokens) < sampling.max_tokens,
        repetition=repetition(tokens),
    )


def prompt_ids(opened: Opened, messages: Sequence[dict[str, str]]) -> list[int]:
    """The ids of a conversation; see Tokens.chat.

    Raises:
        UsageError: the model has no tokenizer, or the prompt is empty.
    """
    if opened.tokens is None:
        raise UsageError(
            f"model: {opened.name} has no tokenizer, so that it cannot be talked to; put one into its folder"
        )
    ids = opened.tokens.chat(messages)
    if not ids:
        raise UsageError("prompt: it is empty; write something")
    return ids


def repetition(ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that occur earlier too; 0 where there are none.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    runs = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return (len(runs) - len(set(runs))) / len(runs) if runs else 0.0
