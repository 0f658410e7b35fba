"""`muonwire plan`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from muonwire.cli.arguments import parse, task_name
from muonwire.cli.plan_table import Planned, as_json, heading, notes, table_lines
from muonwire.errors import UsageError
from muonwire.plan import (
    CANDIDATES,
    Candidate,
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
        recipes: names, or name(option=value, ...); H is chosen where the recipe steps alone and no interval is given, or
            interval="auto"; who averages where all that is sent are signs and no means are given. Default: a list of eleven, and
            one more from eight replicas on.
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
    forms = [form for candidate in candidates for form in candidate.forms(model.module)]
    what = [exchanged(form.at(1.0, steps=setting.steps), model.module) for form in forms]
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


def _show(options: PlanCommand, planned: Planned) -> None:
    if options.json:
        print(as_json(planned))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(*(Text(text) for text in heading(planned)), sep="\n", soft_wrap=True)
    console.print(Text("\n".join(table_lines(planned))), soft_wrap=True)
    console.print(*(Text(text) for text in notes(planned)), sep="\n", soft_wrap=True)
