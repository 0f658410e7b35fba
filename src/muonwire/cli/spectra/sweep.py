"""`muonwire spectra sweep`."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from muonwire.cli.arguments import command
from muonwire.cli.progress import bench_bar
from muonwire.cli.spectra.options import Model, Place, TextChoice, check_count, write_page
from muonwire.spectra.edit import edit_model
from muonwire.spectra.edits import parse_edits
from muonwire.spectra.likeness import Reference
from muonwire.spectra.sweep import SWEEP, Journal, sweep
from muonwire.spectra.sweep_page import sweep_page
from muonwire.spectra.talk import Sampling


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


@command(
    SpectraSweep,
    name="spectra sweep",
    about="Many edits at several strengths, each measured against the original by perplexity and KL, on one page.",
    examples=(
        "muonwire spectra sweep smollm2",
        "muonwire spectra sweep runs/muon --kinds q_proj down_proj --windows 16",
    ),
)
def main(options: SpectraSweep) -> int:
    """Measure every edit, ask some of the edited models, write the page and the table; returns the exit code."""
    check_count([options.model] if options.model else [], 1, action="sweep")
    text, sampling, talk = options.text, options.sampling, parse_edits(options.talk)
    original = options.place.open(options.model)
    reference = Reference(original, text.token_windows(original))
    journal = Journal(options.out, options.model, reference)
    known = dict(journal.found)
    outcomes = []
    with bench_bar(original.label, total=len(SWEEP) * len(options.kinds)) as step:
        for kind, point, found in sweep(original.model, reference, kinds=options.kinds, known=known):
            step(f"{kind}: {point.edit}")
            if str(point.edit) not in known:
                journal.write(point.edit, found)
            outcomes.append((kind, point, found))
    likenesses = [reference.itself]
    with bench_bar("answers", total=(1 + len(talk)) * len(text.prompts)) as step:
        answers = [text.answers(original, sampling, step, label=original.label)]
        for edit in talk:
            # One copy at a time in memory.
            edited = options.place.open(options.model)
            edit_model(edited.model, [edit])
            likenesses.append(reference.compare(edited.model))
            answers.append(text.answers(edited, sampling, step, label=str(edit)))
    page = sweep_page(
        original.label,
        reference.itself,
        outcomes,
        talked=[original.label, *map(str, talk)],
        likenesses=likenesses,
        answers=answers,
        facts=text.facts(sampling),
    )
    path = options.out / "sweep.html"
    write_page(page, path)
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
    table = options.out / "sweep.parquet"
    pl.DataFrame(rows).write_parquet(table)
    print(f"{len(rows)} edits; page: {path}; table: {table}")
    return 0
