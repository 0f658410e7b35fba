"""`muonwire spectra`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from muonwire.cli.actions import Action, dispatch
from muonwire.cli.arguments import parse
from muonwire.cli.progress import bench_bar
from muonwire.errors import UsageError
from muonwire.spectra.models import Opened, open_model
from muonwire.spectra.talk import PROMPTS, Sampling

if TYPE_CHECKING:
    from muonwire.pages import Page

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where models are computed, and in what.

    Args:
        device: such as cpu or cuda. Default: an accelerator where there is one.
        dtype: float32, bfloat16, float16 or float64. Default: what the weights are stored in; float32 for GGUF.
    """

    device: str | None = None
    dtype: str | None = None

    def open(self, name: str) -> Opened:
        """A model, without the library's own bars."""
        import torch
        from transformers.utils import logging

        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"spectra: dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            place = None if self.device is None else str(torch.device(self.device))
        except RuntimeError as error:
            raise UsageError(
                f"spectra: device is {self.device!r}; it takes cpu, cuda, cuda:1 or mps"
            ) from error
        return open_model(
            name, device=place, dtype=None if self.dtype is None else getattr(torch, self.dtype)
        )


@dataclass(frozen=True, kw_only=True)
class SpectraShow:
    """Arguments of `muonwire spectra show`.

    Args:
        models: one or more: folders, GGUF files, runs or checkpoints of ours, hub names, or smollm2.
        out: folder of the page, its charts and the tables as Parquet.
        place: where to compute.
    """

    models: Models = ()
    out: Path = Path("runs/spectra/show")
    place: Place = Place()


@dataclass(frozen=True, kw_only=True)
class SpectraEdit:
    """Arguments of `muonwire spectra edit`.

    Args:
        model: folder, GGUF file, run or checkpoint of ours, hub name, or smollm2.
        edit: edits, applied one after the other: clip(low, high, of), flatten(power), polar, keep(k or fraction, which),
            drop(k or fraction, which), scale(factor, start, stop), permute(seed), rotate(side, seed), each with kind and layers.
        out: folder to write.
        overwrite: replace a model that is there.
        place: where to compute; its dtype is what is written.
    """

    model: Model = ""
    edit: tuple[str, ...] = ()
    out: Path = Path("runs/spectra/edited")
    overwrite: bool = False
    place: Place = Place()


@dataclass(frozen=True, kw_only=True)
class TextChoice:
    """What text is predicted, and what is asked.

    Args:
        text: files of your own. Default: the King James text.
        windows: stretches of the text, spread evenly over it.
        length: tokens of each.
        prompts: what is asked.
    """

    text: tuple[Path, ...] = ()
    windows: int = 8
    length: int = 256
    prompts: tuple[str, ...] = PROMPTS

    def __post_init__(self) -> None:
        if self.windows < 1 or self.length < 2 or not self.prompts:
            raise UsageError(
                f"spectra: windows is {self.windows}, length {self.length}, prompts {len(self.prompts)}; at least 1, 2 and 1 are "
                "wanted"
            )

    @property
    def about(self) -> str:
        """The text's name."""
        return ", ".join(p.name for p in self.text) or "the King James text"

    def read(self) -> str:
        """The text."""
        from muonwire.tasks.text import read_text

        return read_text(self.text).decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class SpectraCompare:
    """Arguments of `muonwire spectra compare`.

    Args:
        models: two or more, the original first.
        out: folder of the page and of compare.json.
        text: what is predicted and asked.
        sampling: how answers are chosen; the same random numbers for every model.
        place: where to compute.
    """

    models: Models = ()
    out: Path = Path("runs/spectra/compare")
    text: TextChoice = TextChoice()
    sampling: Sampling = Sampling()
    place: Place = Place()


@dataclass(frozen=True, kw_only=True)
class SpectraSweep:
    """Arguments of `muonwire spectra sweep`.

    Args:
        model: folder, GGUF file, run or checkpoint of ours, hub name, or smollm2.
        kinds: kinds or groups of weights that are edited, each by itself.
        talk: edits that are also talked to; the original always is.
        out: folder of the page, its charts and sweep.parquet; a sweep that was stopped goes on there.
        text: what is predicted and asked.
        sampling: how answers are chosen.
        place: where to compute.
    """

    model: Model = ""
    kinds: tuple[str, ...] = ("attention", "mlp")
    talk: tuple[str, ...] = (
        "clip(high=4.0)",
        "flatten(power=0.9)",
        "flatten(power=1.25)",
        "drop(fraction=0.1, which='smallest', kind='q_proj')",
        "drop(fraction=0.1, which='smallest', kind='v_proj')",
        "drop(fraction=0.01, kind='mlp')",
    )
    out: Path = Path("runs/spectra/sweep")
    text: TextChoice = TextChoice()
    sampling: Sampling = Sampling()
    place: Place = Place()


@dataclass(frozen=True, kw_only=True)
class SpectraChat:
    """Arguments of `muonwire spectra chat`.

    Args:
        models: one or more, side by side.
        sampling: how answers are chosen.
        place: where to compute.
    """

    models: Models = ()
    sampling: Sampling = Sampling(temperature=0.7, max_tokens=200)
    place: Place = Place()


def _at_least(models: Sequence[str], count: int, command: str) -> None:
    if len(models) < count:
        raise UsageError(
            f"spectra {command}: {len(models)} models are named; at least {count} wanted, such as `muonwire spectra {command} "
            f"{' '.join(['smollm2', 'runs/spectra/edited'][:count])}`"
        )


def _show(args: Sequence[str]) -> int:
    settings = parse(
        SpectraShow,
        args,
        command="spectra show",
        about="Singular values of every weight matrix of a model, or of several beside each other.",
        examples=(
            "muonwire spectra show smollm2",
            "muonwire spectra show runs/adam runs/muon --out runs/spectra/optimizers",
            "muonwire spectra show runs/muon/checkpoints/step_*",
            "muonwire spectra show HuggingFaceTB/SmolLM2-135M --dtype float32",
        ),
    )
    _at_least(settings.models, 1, "show")
    from muonwire.cli.spectra_summary import print_summary
    from muonwire.spectra.measure import Measured, measure, num_matrices, write_measured
    from muonwire.spectra.show_page import show_page

    measured: list[Measured] = []
    facts: list[str] = []
    for name in settings.models:
        opened = settings.place.open(name)
        count = num_matrices(opened.model)
        with bench_bar(opened.label, total=count) as step:
            label = opened.label if opened.label not in [m.label for m in measured] else name
            measured.append(measure(opened.model, label=label, step=step))
        facts.append(f"{label}: {name}, {count} matrices, {next(opened.model.parameters()).dtype}")
        # One model at a time in memory.
        del opened
    paths = write_measured(measured, settings.out)
    page = show_page(measured, facts=[*facts, "muonwire spectra show " + " ".join(settings.models)])
    path = settings.out / "show.html"
    _write_page(page, path)
    print_summary(measured)
    print(f"page: {path}; tables: {', '.join(str(p) for p in paths)}")
    return 0


def _write_page(page: "Page", path: Path) -> None:
    """The page, and each of its charts as a PNG beside it."""
    from muonwire.pages import render_page, write_png

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(page), encoding="utf-8")
    for chart in page.charts:
        write_png(chart, path.parent)


def _edit(args: Sequence[str]) -> int:
    settings = parse(
        SpectraEdit,
        args,
        command="spectra edit",
        about="Change the singular values of a model and write it as an ordinary transformers folder.",
        examples=(
            "muonwire spectra edit smollm2 --edit 'clip(high=2.0)' --out runs/spectra/clipped",
            "muonwire spectra edit smollm2 --edit \"keep(fraction=0.5, kind='mlp')\" \"polar(kind='q_proj', layers='0-9')\"",
            "muonwire spectra edit runs/muon --edit 'flatten(power=0.5)'",
            "muonwire spectra edit smollm2 --out runs/spectra/copy   # no edit: a copy",
        ),
    )
    from muonwire.spectra.edit import check_target, edit_model, num_edited, write_model
    from muonwire.spectra.edits import parse_edits

    _at_least([settings.model] if settings.model else [], 1, "edit")
    edits = parse_edits(settings.edit)
    opened = settings.place.open(settings.model)
    check_target(opened, settings.out, overwrite=settings.overwrite)
    with bench_bar(opened.label, total=num_edited(opened.model, edits)) as step:
        done = edit_model(opened.model, edits, step=step)
    path = write_model(opened, settings.out, edits=edits, edited=done, overwrite=settings.overwrite)
    moved = sorted(done, key=lambda e: -e.moved)
    print(f"{len(done)} matrices edited: {' then '.join(str(e) for e in edits) or 'no edit'}")
    if moved:
        print(f"moved most: {moved[0].name} by {100 * moved[0].moved:.1f} % of its Frobenius norm")
    print(f"model: {path}; talk to both: muonwire spectra chat {settings.model} {path}")
    return 0


def _compare(args: Sequence[str]) -> int:
    settings = parse(
        SpectraCompare,
        args,
        command="spectra compare",
        about="Perplexity on real text, KL to the first model, and the same prompts side by side.",
        examples=(
            "muonwire spectra compare smollm2 runs/spectra/clipped",
            "muonwire spectra compare smollm2 runs/spectra/edited --temperature 0.7 --seed 1 --prompts 'Who are you?'",
        ),
    )
    _at_least(settings.models, 2, "compare")
    from dataclasses import asdict

    from muonwire.spectra.compare_page import compare_page
    from muonwire.spectra.likeness import losses, text_windows
    from muonwire.spectra.talk import answer
    from muonwire.train.checkpoint import write_json
    from muonwire.train.metrics import finite_or_none

    opened = [settings.place.open(name) for name in settings.models]
    text = settings.text
    windows = text_windows(opened[0], text.read(), windows=text.windows, length=text.length)
    likenesses = losses(opened, windows)
    with bench_bar("answers", total=len(opened) * len(text.prompts)) as step:
        answers = []
        for one in opened:
            said = []
            for prompt in text.prompts:
                step(f"{one.label}: {prompt}")
                said.append(answer(one, prompt, settings.sampling))
            answers.append(said)
    labels = _labels(opened)
    page = compare_page(labels, likenesses, answers, text=text.about, facts=_facts(settings.sampling, text))
    path = settings.out / "compare.html"
    _write_page(page, path)
    record = [
        {
            "model": one.name,
            "perplexity": finite_or_none(like.perplexity),
            **{k: finite_or_none(v) for k, v in asdict(like).items()},
            "answers": [asdict(a) for a in said],
        }
        for one, like, said in zip(opened, likenesses, answers, strict=True)
    ]
    write_json(settings.out / "compare.json", record)
    for label, like in zip(labels, likenesses, strict=True):
        print(
            f"{label}: loss {like.loss:.4f} nats a token, perplexity {like.perplexity:.4g}, KL {like.kl:.4f}, "
            f"same most likely token {100 * like.agreement:.1f} %"
        )
    print(f"page: {path}")
    return 0


def _labels(opened: Sequence[Opened]) -> list[str]:
    labels = [one.label for one in opened]
    return labels if len(set(labels)) == len(labels) else [one.name for one in opened]


def _facts(sampling: Sampling, text: TextChoice) -> list[str]:
    how = "the most likely token" if sampling.temperature == 0 else f"temperature {sampling.temperature}"
    return [
        f"{text.windows} windows of {text.length} tokens of {text.about}",
        f"answers of at most {sampling.max_tokens} tokens, {how}, seed {sampling.seed}",
    ]


def _sweep(args: Sequence[str]) -> int:
    settings = parse(
        SpectraSweep,
        args,
        command="spectra sweep",
        about="Many edits at several strengths, each measured against the original by perplexity and KL, on one page.",
        examples=(
            "muonwire spectra sweep smollm2",
            "muonwire spectra sweep runs/muon --kinds q_proj down_proj --windows 16",
        ),
    )
    _at_least([settings.model] if settings.model else [], 1, "sweep")
    import polars as pl

    from muonwire.spectra.edit import edit_model
    from muonwire.spectra.edits import parse_edits
    from muonwire.spectra.likeness import Reference, text_windows
    from muonwire.spectra.sweep import SWEEP, Journal, sweep
    from muonwire.spectra.sweep_page import sweep_page
    from muonwire.spectra.talk import answer

    text, talk = settings.text, parse_edits(settings.talk)
    opened = settings.place.open(settings.model)
    reference = Reference(opened, text_windows(opened, text.read(), windows=text.windows, length=text.length))
    journal = Journal(settings.out, settings.model, reference)
    known = dict(journal.found)
    outcomes = []
    with bench_bar(opened.label, total=len(SWEEP) * len(settings.kinds)) as step:
        for kind, point, found in sweep(opened.model, reference, kinds=settings.kinds, known=known):
            step(f"{kind}: {point.edit}")
            if str(point.edit) not in known:
                journal.write(point.edit, found)
            outcomes.append((kind, point, found))
    answers, likenesses = [], [reference.itself]
    with bench_bar("answers", total=(1 + len(talk)) * len(text.prompts)) as step:
        for edit in (None, *talk):
            # One copy at a time in memory.
            one = opened if edit is None else settings.place.open(settings.model)
            if edit is not None:
                edit_model(one.model, [edit])
                likenesses.append(reference.compare(one.model))
            said = []
            for prompt in text.prompts:
                step(f"{edit or opened.label}: {prompt}")
                said.append(answer(one, prompt, settings.sampling))
            answers.append(said)
    page = sweep_page(
        opened.label,
        reference.itself,
        outcomes,
        talked=[opened.label, *(str(e) for e in talk)],
        likenesses=likenesses,
        answers=answers,
        facts=_facts(settings.sampling, text),
    )
    path = settings.out / "sweep.html"
    _write_page(page, path)
    rows = [
        {
            "kind": kind,
            "edit": point.name,
            "strength": point.strength,
            "text": str(point.edit),
            "loss": found.loss,
            "above": found.loss - reference.itself.loss,
            "perplexity": found.perplexity,
            "kl": found.kl,
            "agreement": found.agreement,
        }
        for kind, point, found in outcomes
    ]
    pl.DataFrame(rows).write_parquet(settings.out / "sweep.parquet")
    print(f"{len(rows)} edits; page: {path}; table: {settings.out / 'sweep.parquet'}")
    return 0


def _chat(args: Sequence[str]) -> int:
    settings = parse(
        SpectraChat,
        args,
        command="spectra chat",
        about="Talk to one model, or to several side by side; an empty line or Ctrl-D ends it, /new forgets what was said.",
        examples=(
            "muonwire spectra chat smollm2 runs/spectra/edited",
            "echo 'Who are you?' | muonwire spectra chat smollm2 --temperature 0",
        ),
    )
    _at_least(settings.models, 1, "chat")
    from muonwire.spectra.chat import chat

    opened = [settings.place.open(name) for name in settings.models]
    chat(opened, _labels(opened), settings.sampling, lines=sys.stdin)
    return 0


ACTIONS: dict[str, tuple[Action, str]] = {
    "show": (_show, "singular values of every weight matrix, of one model or of several"),
    "edit": (_edit, "change singular values and write the model"),
    "compare": (_compare, "perplexity, KL and answers of models beside each other"),
    "sweep": (_sweep, "many edits at several strengths against perplexity and KL"),
    "chat": (_chat, "talk to models side by side"),
}
USAGE = "\n".join(
    [
        "usage: muonwire spectra ACTION MODEL... [options]",
        "",
        *(f"  {name.ljust(7)}  {about}" for name, (_, about) in ACTIONS.items()),
        "",
        "MODEL is a folder of transformers, a GGUF file, a run or checkpoint of `muonwire train`, a hub name, or smollm2.",
        "",
        "examples:",
        "  muonwire spectra show smollm2",
        "  muonwire spectra edit smollm2 --edit 'clip(high=2.0)' --out runs/spectra/clipped",
        "  muonwire spectra compare smollm2 runs/spectra/clipped",
        "  muonwire spectra edit --help",
    ]
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    actions = {name: run for name, (run, _) in ACTIONS.items()}
    return dispatch(args, actions, command="spectra", usage=USAGE)
