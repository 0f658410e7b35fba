"""Tasks: real data + model + loss."""

import pkgutil

from muonwire.errors import UsageError
from muonwire.tasks import table
from muonwire.tasks.base import About, Batch, Task, TaskSettings, named
from muonwire.tasks.language import ModelSettings
from muonwire.tasks.models import MODEL_SIZES, build_llama
from muonwire.tasks.text import TextSettings, TextTask
from muonwire.tasks.vision import VisionSettings, VisionTask
from muonwire.tasks.vision_models import VISION_MODELS, build_vision_model

# The settings of each task by its name: those of tasks/table.py, and what a program adds.
TASKS: dict[str, type[TaskSettings]] = {
    settings.name: settings for line, settings in vars(table).items() if not line.startswith("_")
}


def settings_type(name: str) -> type[TaskSettings]:
    """The settings of the task called ``name``.

    Args:
        name: a key of TASKS, or the settings class of a task of your own with its module, such as "my_tasks.ParitySettings".

    Raises:
        UsageError: there is no such task.
    """
    if name in TASKS or "." not in name:
        return named("task", name, TASKS)
    try:
        found: type[TaskSettings] = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"task: {name!r} cannot be imported ({error}); give module.Class, from a folder that PYTHONPATH holds"
        ) from error
    if TaskSettings not in getattr(found, "__mro__", ()):
        raise UsageError(
            f"task: {name!r} is no settings class of a task; give one that inherits TaskSettings"
        )
    return found


__all__ = [
    "MODEL_SIZES",
    "TASKS",
    "VISION_MODELS",
    "About",
    "Batch",
    "ModelSettings",
    "Task",
    "TaskSettings",
    "TextSettings",
    "TextTask",
    "VisionSettings",
    "VisionTask",
    "build_llama",
    "build_vision_model",
    "settings_type",
]
