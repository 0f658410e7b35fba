"""Text for a model that needs no library but torch, for tests of processes: transformers takes seconds of each to import."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from muonwire.tasks import TextSettings, TextTask
from muonwire.tasks.models import build_seeded

WIDTH = 32


class TinyModel(nn.Module):
    """Each token from the one before it."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return SimpleNamespace(logits=self.lm_head(hidden))


@dataclass(frozen=True, kw_only=True)
class TinySettings(TextSettings):
    """The options of the text task; the model's size has no effect."""

    name: ClassVar[str] = "tests.tiny_task.TinySettings"
    modules: ClassVar[tuple[str, ...]] = ()

    def make(self):
        return TinyTask(self)


class TinyTask(TextTask):
    """Text for a TinyModel."""

    def build_model(self, *, seed):
        return build_seeded(lambda: TinyModel(self.vocabulary), seed=seed)


TINY = ("--task", TinySettings.name)
