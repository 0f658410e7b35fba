"""A statement of a note, with the measurement that settles it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from muonwire.errors import UsageError
from muonwire.lab.engine.check import Check, Row
from muonwire.lab.engine.input import Input
from muonwire.lab.engine.show import Excerpts, Pivot, Plot
from muonwire.lab.engine.verdict import VERDICTS, Decision, Rule, unanimous

T = TypeVar("T")

_ID = re.compile(r"[a-zA-Z0-9]+\.[a-zA-Z0-9]+")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one measurement of a claim is given.

    Args:
        seed: of everything random in it.
        quick: whether sizes and steps are to be as small as a test wants them.
        folder: of the lab's output, where ``inputs/`` lie.
        inputs: the prepared inputs that may be read.
    """

    seed: int
    quick: bool
    folder: Path
    inputs: tuple[Input, ...] = ()

    def pick(self, full: T, quick: T) -> T:
        """One of two sizes."""
        return quick if self.quick else full

    def generator(self, *, stream: int = 0) -> torch.Generator:
        """Random numbers of this seed; streams are independent of each other."""
        return torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + stream)

    def input(self, wanted: Input) -> Path:
        """The folder of a prepared input.

        Raises:
            UsageError: the claim does not declare it.
        """
        if wanted not in self.inputs:
            declared = ", ".join(i.name for i in self.inputs) or "none"
            raise UsageError(
                f"claim: its measurement reads the input {wanted.name!r}, and its inputs are {declared}; add it there"
            )
        return wanted.folder(self.folder, quick=self.quick)


@dataclass(frozen=True, kw_only=True)
class Note:
    """A public text whose claims are measured.

    Args:
        title: as the page names it.
        about: what it says, in our words.
    """

    title: str
    about: str


OWN = Note(title="claims of your own", about="Claims from files named with --claims-from.")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One entry of the lab.

    Args:
        id: such as "conflict.1".
        says: what the note says, in our words.
        note: the text that makes the claim. Default: none, a claim of your own.
        quoted: its figures by what they are, as it writes them. Default: none.
        question: what is measured.
        expected: the outcome that was expected before measuring.
        measure: one repeat: rows of values, each a mapping of columns; the runner adds ``seed``.
        checks: the statements that decide.
        rule: from the outcomes of the checks to a verdict. Default: ``unanimous``.
        verdicts: what the rule can come to with these checks; tested on made data.
        meaning: by verdict, what it means for somebody who trains.
        tables, plots, excerpts: what the page shows of the rows.
        inputs: prepared inputs that ``measure`` reads. Default: none.
        repeats: seeds. Default: those of the inputs, 5 where these have any.
        alone: runs by itself, with all cores, because it measures time. Default: False.
        version: raise it when ``measure`` changes, and finished measurements are repeated.

    Raises:
        UsageError: the id is not of the form word.number, or a verdict lacks its meaning.
    """

    id: str
    says: str
    question: str
    expected: str
    measure: Callable[[Setting], Iterable[Row]]
    checks: tuple[Check, ...]
    meaning: Mapping[str, str]
    note: Note = OWN
    quoted: Mapping[str, str] = field(default_factory=dict)
    rule: Rule = unanimous
    verdicts: tuple[str, ...] = VERDICTS
    tables: tuple[Pivot, ...] = ()
    plots: tuple[Plot, ...] = ()
    excerpts: tuple[Excerpts, ...] = ()
    inputs: tuple[Input, ...] = ()
    repeats: int = 0
    alone: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise UsageError(f"claim: id is {self.id!r}; it takes a form such as conflict.1")
        unknown = [v for v in self.verdicts if v not in VERDICTS]
        if unknown:
            raise UsageError(f"claim {self.id}: verdicts {unknown}; allowed are {', '.join(VERDICTS)}")
        missing = [v for v in self.verdicts if v != "undecided" and v not in self.meaning]
        if missing:
            raise UsageError(f"claim {self.id}: meaning lacks {', '.join(missing)}")
        names = [i for i in self.inputs if not isinstance(i, Input)]
        if names:
            raise UsageError(
                f"claim {self.id}: inputs are {names}; give the inputs themselves, such as "
                "muonwire.lab.inputs.text_training.TEXT_TRAINING"
            )
        if not self.repeats:
            object.__setattr__(self, "repeats", min((i.seeds for i in self.inputs if i.seeds), default=5))
        if not self.checks:
            raise UsageError(f"claim {self.id}: it has no checks; nothing would decide it")

    def decide(self, rows: Sequence[Row]) -> Decision:
        """The verdict that the rows of all repeats give."""
        outcomes = tuple(check.evaluate(rows) for check in self.checks)
        return Decision(verdict=self.rule(outcomes), outcomes=outcomes)
