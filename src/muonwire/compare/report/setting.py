"""The setting of a comparison, as its page states it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from muonwire.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ReportSetting:
    """The setting of a comparison, as the page prints it.

    Args:
        title: of the page.
        command: the command line that regenerates the comparison.
        task: the task in one line.
        model: the model in one line.
        replicas: number of replicas.
        steps: optimizer steps of each run.
        batch_terms: terms of the loss per optimizer step over all replicas; ``None`` leaves it out.
        terms: what they are. Default: "tokens".
        lr_grid: the learning rates tried, for all recipes or by recipe.
        lr_searched: the grid that an earlier search tried with this setting, where ``lr_grid`` holds only what it found best.
            Default: none.
        seeds: the seeds of each recipe at its chosen rate.
        link: the link that link times are modelled for, such as ``"10mbit/50ms"``.
        machine: the machine in one line.
        versions: version by package.
        notes: remarks to print with the setting.
        date: of the runs, as text; ``None`` leaves it out.
        reference: the recipe whose final loss is the target that bytes and time are counted to. Default: the
            highest final loss of the recipes that finished.
        subject: the recipe that the comparison is about; the findings give its place. Default: none.

    Raises:
        UsageError: for fewer than one replica or step, or no seed.
    """

    title: str
    command: str
    task: str
    model: str
    replicas: int
    steps: int
    link: str
    machine: str
    lr_grid: Sequence[float] | Mapping[str, Sequence[float]]
    seeds: Sequence[int]
    lr_searched: Sequence[float] = ()
    batch_terms: int | None = None
    terms: str = "tokens"
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    date: str | None = None
    reference: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        for name in ("replicas", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"ReportSetting: {name} is {getattr(self, name)}; it must be at least 1")
        if not self.seeds:
            raise UsageError("ReportSetting: seeds is empty; name at least the one seed that was run")
