"""Tasks: real data + model + loss."""

from muonwire.tasks.base import Batch, Task
from muonwire.tasks.models import MODEL_SIZES, build_llama
from muonwire.tasks.text import TextSettings, TextTask

__all__ = ["MODEL_SIZES", "Batch", "Task", "TextSettings", "TextTask", "build_llama"]
