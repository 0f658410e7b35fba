"""`muonwire spectra compare`."""

from dataclasses import asdict, dataclass
from pathlib import Path

from muonwire.cli.arguments import command
from muonwire.cli.progress import bench_bar
from muonwire.cli.spectra.options import Models, Place, TextChoice, check_count, labels_of, write_page
from muonwire.spectra.compare_page import compare_page
from muonwire.spectra.likeness import losses
from muonwire.spectra.talk import Sampling
from muonwire.train.checkpoint import write_json
from muonwire.train.metrics import finite_or_none


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


@command(
    SpectraCompare,
    name="spectra compare",
    about="Perplexity on real text, KL to the first model, and the same prompts side by side.",
    examples=(
        "muonwire spectra compare smollm2 runs/spectra/clipped",
        "muonwire spectra compare smollm2 runs/spectra/edited --temperature 0.7 --seed 1 --prompts 'Who are you?'",
    ),
)
def main(options: SpectraCompare) -> int:
    """Measure the models beside the first, write the page and compare.json; returns the exit code."""
    check_count(options.models, 2, action="compare")
    text, sampling = options.text, options.sampling
    models = [options.place.open(name) for name in options.models]
    likenesses = losses(models, text.token_windows(models[0]))
    with bench_bar("answers", total=len(models) * len(text.prompts)) as step:
        answers = [text.answers(model, sampling, step, label=model.label) for model in models]
    labels = labels_of(models)
    page = compare_page(labels, likenesses, answers, text=text.about, facts=text.facts(sampling))
    path = options.out / "compare.html"
    write_page(page, path)
    record = [
        {
            "model": model.name,
            "perplexity": finite_or_none(likeness.perplexity),
            **{name: finite_or_none(value) for name, value in asdict(likeness).items()},
            "answers": [asdict(answer) for answer in its_answers],
        }
        for model, likeness, its_answers in zip(models, likenesses, answers, strict=True)
    ]
    write_json(options.out / "compare.json", record)
    for label, likeness in zip(labels, likenesses, strict=True):
        print(
            f"{label}: loss {likeness.loss:.4f} nats a token, perplexity {likeness.perplexity:.4g}, KL {likeness.kl:.4f}, "
            f"same most likely token {100 * likeness.agreement:.1f} %"
        )
    print(f"page: {path}")
    return 0
