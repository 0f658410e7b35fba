"""The settings of one training run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.optim.prometheus import check_path
from muonwire.tasks import TaskSettings, TextSettings
from muonwire.train.schedule import lr_factor

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One recipe on one task.

    Args:
        recipe: name, or name(option=value, ...), such as "local_muon(interval=10)".
        lr: peak learning rate.
        steps: optimizer steps.
        seed: of the initial weights and of the data order.
        schedule: of the learning rate after the warm-up: cosine, linear (both to lr_floor) or constant.
        warmup_steps: steps of linear rise to lr.
        lr_floor: last learning rate as a share of lr.
        accumulate: parts in which a replica's batch is computed, one after the other: the same step in less memory.
        clip: largest norm of a replica's own gradient, to which a longer one is shortened before the optimizer. Default: none.
        evaluate_every: steps between evaluations; the last step is always evaluated.
        checkpoint_every: steps between checkpoints, the last step always; 0: only when a signal stops the run.
        digest_every: steps between comparisons of the replicas' weights; 0: at the end only.
        probes: steps at which Diagnostics measures, at equal distances; it keeps one float32 copy of the hidden matrices. 0: none.
        tensorboard: write TensorBoard events beside metrics.jsonl.
        prometheus: a file that ends in .prom, for the textfile collector of Prometheus' node exporter: steps, losses, bytes,
            waiting; the first replica of each host writes it, once a second at most (docs/prometheus.md). Default: none.
        sites: the replicas make so many sites of equally many, by their order; those of a site average their gradients at every
            step and exchange as one with the other sites (docs/sites.md). Default: every replica is by itself.
        compile: run the model through torch.compile, which needs a C++ compiler on a CPU; the loss rounds differently.
        task: the data and the model.
    """

    recipe: str = "muon"
    lr: float = 0.01
    steps: int = 300
    seed: int = 0
    schedule: str = "cosine"
    warmup_steps: int = 10
    lr_floor: float = 0.1
    accumulate: int = 1
    clip: float | None = None
    evaluate_every: int = 50
    checkpoint_every: int = 100
    digest_every: int = 50
    probes: int = 4
    tensorboard: bool = True
    prometheus: Path | None = None
    sites: int | None = None
    compile: bool = False
    # Without a name, its options stand among the run's own on the command line.
    task: Annotated[TaskSettings, arg(name="")] = field(default_factory=TextSettings)

    def __post_init__(self) -> None:
        name, options = recipes.parse_recipe(self.recipe)
        recipes.find(name).make_options(options)
        if self.prometheus is not None:
            check_path(self.prometheus)
        if self.sites is not None and self.sites < 2:
            raise UsageError(
                f"train: sites is {self.sites}; give at least 2, or leave it out: then every replica is by itself"
            )
        if not self.lr > 0:
            raise UsageError(f"train: lr is {self.lr}; it must be positive")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"train: schedule is {self.schedule!r}; allowed are {', '.join(SCHEDULES)}")
        if self.steps < 1 or self.evaluate_every < 1:
            raise UsageError(
                f"train: steps is {self.steps} and evaluate_every is {self.evaluate_every}; both are at least 1"
            )
        if self.accumulate < 1:
            raise UsageError(f"train: accumulate is {self.accumulate}; a batch has at least 1 part")
        if self.clip is not None and not self.clip > 0:
            raise UsageError(f"train: clip is {self.clip}; it must be positive, or be left out")
        for name in ("warmup_steps", "checkpoint_every", "digest_every", "probes", "lr_floor", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"train: {name} is {getattr(self, name)}; it must not be negative")

    def lr_factor(self, step: int, *, steps: int | None = None) -> float:
        """The learning rate of a step as a share of its peak, in a run of this length or of ``steps``."""
        steps = self.steps if steps is None else steps
        warmup_steps, floor = self.warmup_steps, self.lr_floor
        return lr_factor(step, steps=steps, warmup_steps=warmup_steps, kind=self.schedule, floor=floor)

    def identity(self) -> dict[str, Any]:
        """What decides the outcome of the run, as JSON has it."""
        settings = {**asdict(self), "task": self.task.identity()}
        for key in ("checkpoint_every", "digest_every", "probes", "tensorboard", "prometheus"):
            del settings[key]
        # Checkpoints from before these were there do not name them.
        for key, unused in (("compile", False), ("sites", None), ("accumulate", 1), ("clip", None)):
            if settings[key] == unused:
                del settings[key]
        return settings
