"""Tasks: real data + model + loss."""

from muonwire.errors import UsageError
from muonwire.tasks.base import About, Batch, Task
from muonwire.tasks.models import MODEL_SIZES, build_llama
from muonwire.tasks.text import TextSettings, TextTask
from muonwire.tasks.vision import VisionSettings, VisionTask
from muonwire.tasks.vision_models import VISION_MODELS, build_vision_model

TaskSettings = TextSettings | VisionSettings
# By the name that the command line has for them.
TASKS: dict[str, type[TaskSettings]] = {"text": TextSettings, "vision": VisionSettings}


def settings_type(name: str) -> type[TaskSettings]:
    """The settings of the task called ``name``.

    Raises:
        UsageError: there is no such task.
    """
    if name not in TASKS:
        raise UsageError(f"task: {name!r} is unknown; allowed are {', '.join(TASKS)}")
    return TASKS[name]


def make_task(settings: TaskSettings) -> Task:
    """The task that ``settings`` describe.

    Raises:
        UsageError: its data is missing, damaged or too small.
    """
    return TextTask(settings) if isinstance(settings, TextSettings) else VisionTask(settings)


__all__ = [
    "MODEL_SIZES",
    "TASKS",
    "VISION_MODELS",
    "About",
    "Batch",
    "Task",
    "TaskSettings",
    "TextSettings",
    "TextTask",
    "VisionSettings",
    "VisionTask",
    "build_llama",
    "build_vision_model",
    "make_task",
    "settings_type",
]
