"""A claim about coins in one file, the command that runs it, and a check on a made column."""

import textwrap

import pytest

from muonwire.cli.main import main
from muonwire.lab import Check

TOY = textwrap.dedent(
    '''
    """toy.1: coins are fair."""

    import torch

    from muonwire.lab import Check, Claim, Pivot, Plot, Reading


    def measure(setting):
        """Heads of many throws."""
        heads = torch.rand(10_000, generator=setting.generator()) < 0.5
        return [{"coin": "made", "heads": float(heads.float().mean()), "throws": setting.pick(10_000, 10_000)}]


    CLAIM = Claim(
        id="toy.1",
        says="a coin falls on either side equally often",
        quoted={"heads": "one half"},
        question="How often is it heads?",
        expected="As often as not.",
        measure=measure,
        checks=(
            Check(
                name="heads are between 0.45 and 0.55 of all throws",
                setting="as in the note",
                column="heads",
                at_least=0.45,
                at_most=0.55,
                possible=(0.0, 1.0),
                reading=Reading(holds="a coin is fair", fails="a coin is not fair", by="heads {mean} of the time"),
            ),
        ),
        verdicts=("confirmed", "refuted", "undecided"),
        meaning={"confirmed": "Throw it.", "refuted": "Keep it."},
        tables=(
            Pivot(caption="Heads", rows={"coin": "Coin"}, values={"heads": "Heads"}, quoted={("made",): {"heads": "1/2"}}),
        ),
        plots=(
            Plot(name="heads", title="Heads", how_to_read="Higher is more.", x=("coin", "Coin"), y=("heads", "Heads"), mark="bar"),
        ),
        repeats=2,
    )
    '''
)


def command(*args):
    with pytest.raises(SystemExit) as stop:
        main(["lab", *map(str, args)])
    return stop.value.code


def check(**changes):
    return Check(
        **{
            "name": "x is large",
            "setting": "here",
            "column": "x",
            "at_least": 1.0,
            "possible": (0.0, 2.0),
            **changes,
        }
    )
