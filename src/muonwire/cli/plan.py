"""`muonwire plan`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from muonwire.cli.arguments import parse, task_name
from muonwire.cli.compare import wrap_recipe
from muonwire.errors import UsageError
from muonwire.pages.units import bytes_text, digits_text, percent_text, seconds_text
from muonwire.plan import (
    CANDIDATES,
    Candidate,
    Cost,
    Line,
    Machine,
    PlannedModel,
    Planner,
    Rates,
    Setting,
    as_told,
    measured,
    of_task,
    read_model,
)
from muonwire.plan.commands import Command, in_python, torchrun
from muonwire.plan.evidence import family_of
from muonwire.plan.exchanges import exchanged
from muonwire.tasks import TaskSettings, TextSettings, settings_type
from muonwire.train.launch import process_group, set_threads, under_launcher
from muonwire.transport.base import Transport

EXAMPLES = (
    "muonwire plan --up 20mbit --down 200mbit --latency 40ms --replicas 8 --parameters 124e6 --step-s 0.8",
    "muonwire plan --up 10mbit --down 10mbit --replicas 4 --parameters gpt2 --step-s 1.2 --steps 20000 --price-per-gb 0.08",
    "muonwire plan --up 10mbit --down 10mbit --replicas 4 --text book.txt --model-size micro --measure",
    "muonwire plan --up 1gbit --down 1gbit --replicas 16 --parameters 1e9 --step-s 2 --recipes muon one_bit_muon --json",
    "torchrun --nnodes 4 --node-rank 0 --master-addr 10.0.0.1 --nproc-per-node 1 -m muonwire plan --measure --text book.txt",
)
NOT_FITTING, EXTRAPOLATED = "*", "†"
RECIPE_WIDTH = 21
COLUMN_GAP = "  "
HEADINGS = [
    ["", "recipe"],
    ["", "H"],
    ["each way:", "sync, all"],
    ["wait", "a step"],
    ["", "share"],
    ["loss beside", "dense Muon"],
    ["", "time"],
    ["", "money"],
]


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Arguments of `muonwire plan`.

    Args:
        up: rate at which each replica sends, such as 20mbit; measured where it is left out under torchrun with --measure.
        down: rate at which each replica receives.
        latency: delay of a message one way, such as 40ms.
        replicas: that train together; under torchrun those that it has started.
        parameters: their number, such as 124e6; a model size of `muonwire train`; or a folder with config.json or a hub name, of
            which no weights are loaded. Default: the model of the task.
        step_s: seconds of a step with its optimizer and without exchange.
        steps: of the run.
        share: largest share of the time that may go to exchange.
        price_per_gb: of 10⁹ bytes that leave a replica.
        recipes: names, or name(option=value, ...); H is chosen where the recipe steps alone and no interval is given. Default: a
            list of ten.
        measure: time the steps of the task on this machine, instead of --step-s; under torchrun on all, and the link between them.
        json: print JSON instead of the table.
        threads: of the arithmetic that is measured. Default: a replica's share of the cores.
        secret_file: as `muonwire train` has it, under torchrun.
        allow_public: as `muonwire train` has it, under torchrun.
        task: "text", "vision", or a task of your own; with --help after it, the options of that task.
        settings: of the task.
    """

    up: str = ""
    down: str = ""
    latency: str = ""
    replicas: int | None = None
    parameters: str = ""
    step_s: float | None = None
    steps: int = 10_000
    share: float = 0.05
    price_per_gb: float | None = None
    recipes: tuple[str, ...] = ()
    measure: bool = False
    json: bool = False
    threads: int | None = None
    secret_file: Path | None = None
    allow_public: bool = False
    task: str = "text"
    # Without a name, its options stand among the command's own.
    settings: Annotated[TaskSettings, arg(name="")] = field(default_factory=TextSettings)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, as it is shown."""

    setting: Setting
    model: PlannedModel
    rates: Rates
    machine: Machine
    lines: Sequence[Line]


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = (
        "Choose a recipe for a link, a model and a number of replicas before the run: how often each recipe synchronizes so that "
        "exchange stays below a share of the time, what it sends, how long the run takes, and what it costs in loss by the kept "
        "evidence (docs/plan.md)."
    )
    default = PlanCommand(settings=settings_type(task_name(args))())
    options = parse(PlanCommand, args, command="plan", about=about, examples=EXAMPLES, default=default)
    candidates = [Candidate(recipe=text) for text in options.recipes] or list(CANDIDATES)
    if not (options.measure and under_launcher()):
        _show(options, _plan(options, candidates, None))
        return 0
    with process_group(secret_file=options.secret_file, allow_public=options.allow_public) as make_transport:
        transport = make_transport()
        set_threads(transport.world_size, options.threads)
        planned = _plan(options, candidates, transport)
        if transport.rank == 0:
            _show(options, planned)
    return 0


def _plan(options: PlanCommand, candidates: Sequence[Candidate], transport: Transport | None) -> Planned:
    setting = Setting(
        replicas=_replicas(options, transport),
        steps=options.steps,
        share=options.share,
        price_per_gb=options.price_per_gb,
    )
    told = _told_rates(options, transport)
    if not options.measure and options.step_s is None:
        raise UsageError(
            "plan: how long a step takes is not known; give --step-s SECONDS, or --measure to time the task's own steps"
        )
    if options.step_s is not None and not 0 < options.step_s < float("inf"):
        raise UsageError(f"plan: step_s is {options.step_s}; a step takes more than 0 seconds")
    if options.measure and (options.parameters or options.step_s is not None):
        raise UsageError(
            "plan: --measure times the task's own model; leave --parameters and --step-s out, or leave --measure out"
        )
    task = None if options.parameters else options.settings.make()
    model = read_model(options.parameters) if task is None else of_task(task)
    what = [exchanged(c.at(1.0, steps=setting.steps), model.module) for c in candidates]
    if options.measure:
        assert task is not None
        if transport is None:
            set_threads(1, options.threads)
        from muonwire.transport import SingleReplica

        machine = measured(task, what, transport or SingleReplica(), replicas=setting.replicas)
    else:
        assert options.step_s is not None
        machine = as_told(options.step_s, what, replicas=setting.replicas)
    rates = told or machine.rates
    assert rates is not None
    planner = Planner(setting, model, rates, machine, _command(options, model, setting))
    return Planned(
        setting=setting, model=model, rates=rates, machine=machine, lines=planner.lines(candidates)
    )


def _replicas(options: PlanCommand, transport: Transport | None) -> int:
    if transport is None:
        if options.replicas is None:
            raise UsageError("plan: the number of replicas is not known; give --replicas, at least 2")
        return options.replicas
    if options.replicas not in (None, transport.world_size):
        raise UsageError(
            f"plan: replicas is {options.replicas}, and torchrun has started {transport.world_size}; leave --replicas out"
        )
    return transport.world_size


def _told_rates(options: PlanCommand, transport: Transport | None) -> Rates | None:
    """The link as the options have it; None where it is to be measured."""
    if options.up and options.down:
        return Rates.parse(up=options.up, down=options.down, latency=options.latency or "0ms")
    if options.up or options.down or options.latency or transport is None:
        missing = [f"--{name}" for name in ("up", "down") if not getattr(options, name)]
        raise UsageError(
            f"plan: {' and '.join(missing)} of the link {'are' if len(missing) > 1 else 'is'} missing; give --up, --down and "
            "--latency, such as 20mbit, 200mbit and 40ms, or none of them under torchrun with --measure"
        )
    return None


def _command(options: PlanCommand, model: PlannedModel, setting: Setting) -> Command:
    if not options.parameters:
        return torchrun(options.settings, replicas=setting.replicas, steps=setting.steps)
    if model.preset is not None:
        task = TextSettings(model_size=model.preset)
        return torchrun(task, replicas=setting.replicas, steps=setting.steps)
    return in_python


def as_json(planned: Planned) -> str:
    """The whole plan as JSON."""
    machine = planned.machine
    lines = [
        {
            **asdict(line),
            "wait_s": line.wait_s,
            "total_up_bytes": line.total_up_bytes,
            "total_down_bytes": line.total_down_bytes,
        }
        for line in planned.lines
    ]
    record: dict[str, Any] = {
        "setting": asdict(planned.setting),
        "model": {
            "about": planned.model.about,
            "num_parameters": planned.model.num_parameters,
            "num_in_matrices": planned.model.num_in_matrices,
        },
        "rates": asdict(planned.rates),
        "machine": asdict(replace(machine, rates=None)),
        "recipes": lines,
    }
    return json.dumps(record, indent=1)


def _show(options: PlanCommand, planned: Planned) -> None:
    if options.json:
        print(as_json(planned))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(*(Text(text) for text in heading(planned)), sep="\n")
    console.print(Text("\n".join(table_lines(planned))), soft_wrap=True)
    console.print(*(Text(text) for text in notes(planned)), sep="\n", soft_wrap=True)


def heading(planned: Planned) -> list[str]:
    """What was planned for."""
    setting, model, machine = planned.setting, planned.model, planned.machine
    parts = f"{model.num_parameters:,} trainable ({model.num_in_matrices:,} in matrices)"
    step = f"{seconds_text(machine.compute_s)} forward and backward"
    spent = [f"{seconds_text(s)} {inner}" for inner, s in machine.optimizer_s.items() if s]
    return [
        f"{setting.replicas} replicas, {setting.steps:,} steps: {model.about}; {parts}",
        f"link of each: {planned.rates}{' (measured)' if planned.rates.goodput else ''}",
        f"a step without exchange: {step}, optimizer {', '.join(spent)} (measured)"
        if spent
        else f"a step without exchange: {seconds_text(machine.compute_s)}",
        f"exchange may take {percent_text(setting.share)} of the time",
        "",
    ]


def table_lines(planned: Planned) -> list[str]:
    """The table: two rows of figures for each recipe, whose name may take more."""
    blocks = [HEADINGS, *([cell.split("\n") for cell in _cells(line)] for line in planned.lines)]
    if planned.setting.price_per_gb is None:
        blocks = [block[:-1] for block in blocks]
    widths = [max(len(row) for cell in column for row in cell) for column in zip(*blocks, strict=True)]
    lines = []
    for block in blocks:
        for row in zip_longest(*block, fillvalue=""):
            first, *others = (
                text.rjust(w) if i else text.ljust(w)
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
            lines.append(COLUMN_GAP.join((first, *others)).rstrip())
        if block is blocks[0]:
            lines.append("─" * (sum(widths) + len(COLUMN_GAP) * (len(widths) - 1)))
    return lines


def _cells(line: Line) -> list[str]:
    return [
        "\n".join(wrap_recipe(line.recipe, RECIPE_WIDTH)),
        digits_text(line.spacing),
        f"{_each_way(line.up_bytes, line.down_bytes)}\n{_each_way(line.total_up_bytes, line.total_down_bytes)}",
        seconds_text(line.wait_s),
        percent_text(line.share) + ("" if line.fits else NOT_FITTING),
        "not known" if line.cost is None else cost_text(line.cost),
        seconds_text(line.total_s),
        "" if line.money is None else f"{line.money:,.2f}",
    ]


def _each_way(up_bytes: float, down_bytes: float) -> str:
    """One number where both are the same."""
    up, down = bytes_text(up_bytes), bytes_text(down_bytes)
    return up if up == down else f"{up} up, {down} down"


def cost_text(cost: Cost) -> str:
    """Percents: the expected cost, and its range.

    >>> cost_text(Cost(expected=0.028, low=0.01, high=0.046, lr=0.014, sources=(), extrapolated=("replicas",)))
    '+2.8 %†\\n1.0 to 4.6'
    """
    mark = EXTRAPOLATED if cost.extrapolated else ""
    return f"{100 * cost.expected:+.1f} %{mark}\n{100 * cost.low:.1f} to {100 * cost.high:.1f}"


def notes(planned: Planned) -> list[str]:
    """What the marks mean, where losses come from, and how to begin."""
    texts = []
    if any(not line.fits for line in planned.lines):
        texts.append(f"{NOT_FITTING} more than the share that exchange may take")
    families: dict[tuple[str, ...], list[str]] = {}
    for line in planned.lines:
        if line.cost is not None:
            families.setdefault(line.cost.sources, []).append(family_of(line.recipe))
    texts.append("loss after as many steps, over dense Muon's; docs/plan.md has the formula. It comes from:")
    texts += [
        f"  {', '.join(dict.fromkeys(names))}: {'; '.join(sources)}" for sources, names in families.items()
    ]
    beyond: dict[str, list[str]] = {}
    for line in planned.lines:
        for reason in () if line.cost is None else line.cost.extrapolated:
            beyond.setdefault(reason, []).append(family_of(line.recipe))
    if beyond:
        texts.append(f"{EXTRAPOLATED} outside of what was measured:")
        texts += [f"  {reason}: {', '.join(dict.fromkeys(names))}" for reason, names in beyond.items()]
    fitting = [line for line in planned.lines if line.fits]
    if fitting:
        others = ", the others with their own --recipe and --lr" if "torchrun" in fitting[0].command else ""
        texts += ["", f"the first of the table{others} (--json has all commands):", fitting[0].command]
    else:
        texts += ["", "no recipe keeps exchange below this share: give a larger --share, or more --steps"]
    return texts
