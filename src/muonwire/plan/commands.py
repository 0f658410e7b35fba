"""The command or the code that runs a recipe of a plan."""

import os
import shlex
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

from muonwire.recipes import parse_recipe
from muonwire.tasks.base import TaskSettings

# Of a recipe and a learning rate, where one is known: what runs it.
Command = Callable[[str, float | None], str]
MASTER, PORT = "ADDRESS_OF_THE_FIRST_MACHINE", "29400"


def torchrun(task: TaskSettings, *, replicas: int, steps: int) -> Command:
    """One replica a machine: what is started on the first, and on the others with their own ``--node-rank``.

    The address of the first machine is what torchrun said here, and a word to replace where it said nothing.
    """
    start = ["torchrun", "--nnodes", str(replicas), "--node-rank", "0"]
    start += ["--master-addr", os.environ.get("MASTER_ADDR", MASTER)]
    start += ["--master-port", PORT, "--rdzv-conf", "timeout=20", "--nproc-per-node", "1"]
    words = [*start, "-m", "muonwire", "train", *_task_words(task), "--steps", str(steps)]

    def command(recipe: str, lr: float | None) -> str:
        rate = [] if lr is None else ["--lr", f"{lr:g}"]
        return shlex.join([*words, "--recipe", recipe, *rate, "--out", "runs/planned"])

    return command


def in_python(recipe: str, lr: float | None) -> str:
    """The optimizer in a training loop of one's own."""
    name, options = parse_recipe(recipe)
    given = {"lr": 0.01 if lr is None else lr, **options}
    words = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f"optimizer = muonwire.recipes.{name}(model, transport=transport, {words})"


def _task_words(task: TaskSettings) -> list[str]:
    """The options of a task that are not its defaults, as the command line takes them."""
    words = [] if task.name == "text" else ["--task", task.name]
    for option in fields(task):
        value = getattr(task, option.name)
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        if value == default:
            continue
        flag = option.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple | list) else [value]
            words += [f"--{flag}", *(str(v.resolve() if isinstance(v, Path) else v) for v in values)]
    return words
