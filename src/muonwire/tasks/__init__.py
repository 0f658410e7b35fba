"""Tasks: real data + model + loss."""

from muonwire.tasks.base import Batch, Task
from muonwire.tasks.models import MODEL_SIZES, build_llama
from muonwire.tasks.text import TextSettings, TextTask
from muonwire.tasks.vision import VisionSettings, VisionTask
from muonwire.tasks.vision_models import VISION_MODELS, build_vision_model

__all__ = [
    "MODEL_SIZES",
    "VISION_MODELS",
    "Batch",
    "Task",
    "TextSettings",
    "TextTask",
    "VisionSettings",
    "VisionTask",
    "build_llama",
    "build_vision_model",
]
