"""What is left of a part of the grid: each recipe's rates, then the further seeds of those that end close together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scale.plan import CLOSE, DENSE, RATES, SUBJECT, TURNS, Part, Setting, usual_rate
from benchmarks.scale.record import Record

from muonwire.compare.config import Comparison
from muonwire.compare.runs import Result, Run, outwards
from muonwire.compare.virtual import Job

# Of a replica's step: what does not depend on the work, in units of the work on a sequence of 64 bytes by a thousand parameters.
OVERHEAD = 700.0


class Cell:
    """One recipe in one setting.

    Args:
        setting, config: of it.
        recipe: one of the setting's.
        record: of finished runs.
        command: that runs them.
        most: rates that are tried at most.
    """

    def __init__(
        self, setting: Setting, config: Comparison, recipe: str, record: Record, *, command: str, most: int
    ) -> None:
        self.setting, self.config, self.recipe = setting, config, recipe
        self._record, self._command, self._most = record, command, most

    def find(self, run: Run) -> dict[str, Any] | None:
        """The row of a run."""
        row: dict[str, Any] | None = self._record.find(self.setting, self.config, run, command=self._command)
        return row

    def _result(self, run: Run) -> Result | None:
        row = self.find(run)
        return None if row is None else {"final_eval_loss": row["loss"]}

    @property
    def tried(self) -> list[Run]:
        """The runs of the first seed, as far as they are known by now."""
        grid = [Run(self.recipe, lr, self.setting.seeds[0]) for lr in RATES]
        sequences = self.setting.replicas * self.setting.batch
        begin = usual_rate(self.recipe, sequences=sequences, size=self.setting.size)
        return outwards(grid, self._result, begin=begin, most=self._most)

    @property
    def best(self) -> Run | None:
        """The tried run of the lowest loss, once all are done; None where all diverged."""
        rows = [(run, self.find(run)) for run in self.tried]
        if any(row is None for _, row in rows):
            return None
        losses = [(row["loss"], run) for run, row in rows if row is not None and row["loss"] is not None]
        return min(losses)[1] if losses else None

    @property
    def first_loss(self) -> float | None:
        """With the first seed, at the best rate."""
        best = self.best
        row = None if best is None else self.find(best)
        return None if row is None else row["loss"]

    @property
    def further(self) -> list[Run]:
        """The runs of the other seeds at the best rate."""
        best = self.best
        return [] if best is None else [best._replace(seed=seed) for seed in self.setting.seeds[1:]]


class Grid:
    """A part with its finished runs.

    Args:
        part: of the grid.
        record: of finished runs.
        runs, texts: folders.
        command: that runs them.
        compile: run the models through torch.compile.
        most: rates that a recipe tries at most.
    """

    def __init__(
        self, part: Part, record: Record, *, runs: Path, texts: Path, command: str, compile: bool, most: int
    ) -> None:
        self._rows: list[list[Cell]] = []
        for setting in part.settings:
            made = [
                (r, setting.comparison(r, runs=runs, compile=compile, texts=texts)) for r in setting.recipes
            ]
            self._rows.append([Cell(setting, c, r, record, command=command, most=most) for r, c in made])

    def left(self) -> Iterator[Job]:
        """The runs that are left by now, in the order of their use: setting by setting, its recipes' rates before more seeds."""
        for cells in self._rows:
            for cell in cells:
                yield from (Job(cell.config, run) for run in cell.tried if cell.find(run) is None)
            for cell in self._close(cells):
                yield from (Job(cell.config, run) for run in cell.further if cell.find(run) is None)

    @property
    def modules(self) -> tuple[str, ...]:
        """What all runs import."""
        return tuple(
            dict.fromkeys(m for cells in self._rows for c in cells[:1] for m in c.config.task.modules)
        )

    @staticmethod
    def _close(cells: list[Cell]) -> list[Cell]:
        """The reference, the subject, and what ends close to either, once all rates of the setting are tried."""
        losses = {cell.recipe: cell.first_loss for cell in cells}
        if any(cell.find(run) is None for cell in cells for run in cell.tried):
            return []
        dense = min((loss for r in DENSE if (loss := losses.get(r)) is not None), default=None)
        near = [loss for loss in (dense, losses.get(SUBJECT), losses.get(TURNS)) if loss is not None]
        return [
            cell
            for cell in cells
            if (loss := losses[cell.recipe]) is not None
            # Of dense Muon's two, the reference alone.
            and (loss == dense or cell.recipe not in DENSE)
            and any(abs(loss / n - 1) <= CLOSE for n in near)
        ]

    def _cell(self, job: Job) -> Cell:
        return next(
            c for cells in self._rows for c in cells if c.config is job.config and c.recipe == job.run.recipe
        )

    def find(self, job: Job) -> dict[str, Any] | None:
        """The row of a job."""
        return self._cell(job).find(job.run)

    def cost(self, job: Job) -> float:
        """The work of a job, in units that only compare."""
        setting: Setting = self._cell(job).setting
        return cost_of(setting)

    def costs(self) -> tuple[float, float]:
        """The work that is done and the work that is left, as far as is known: a recipe needs three rates at least."""
        done = left = 0.0
        for cells in self._rows:
            for cell in cells:
                finished = sum(cell.find(run) is not None for run in cell.tried)
                seeds = [cell.find(run) is not None for run in cell.further]
                cost = cost_of(cell.setting)
                done += cost * (finished + sum(seeds))
                left += cost * (len(cell.tried) - finished)
            close = self._close(cells)
            left += sum(cost_of(c.setting) * sum(c.find(run) is None for run in c.further) for c in close)
        return done, left


def cost_of(setting: Setting) -> float:
    """The work of a run, in units that only compare."""
    parameters = {"pico": 123, "nano": 459, "micro": 2706, "mini": 10245}[setting.size]
    replica_steps: int = setting.steps * setting.replicas
    work: float = OVERHEAD + setting.batch * parameters
    return replica_steps * work
