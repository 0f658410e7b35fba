"""`muonwire spectra show`."""

from dataclasses import dataclass
from pathlib import Path

from muonwire.cli.arguments import command
from muonwire.cli.progress import bench_bar
from muonwire.cli.spectra.options import Models, Place, check_count, write_page
from muonwire.cli.spectra.summary import print_summary
from muonwire.spectra.measure import Measured, measure, num_matrices, write_measured
from muonwire.spectra.show_page import show_page


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


@command(
    SpectraShow,
    name="spectra show",
    about="Singular values of every weight matrix of a model, or of several beside each other.",
    examples=(
        "muonwire spectra show smollm2",
        "muonwire spectra show runs/adam runs/muon --out runs/spectra/optimizers",
        "muonwire spectra show runs/muon/checkpoints/step_*",
        "muonwire spectra show HuggingFaceTB/SmolLM2-135M --dtype float32",
    ),
)
def main(options: SpectraShow) -> int:
    """Measure the models, write the page and its tables, print the medians; returns the exit code."""
    check_count(options.models, 1, action="show")
    measured: list[Measured] = []
    facts: list[str] = []
    for name in options.models:
        opened = options.place.open(name)
        count = num_matrices(opened.model)
        with bench_bar(opened.label, total=count) as step:
            label = opened.label if opened.label not in [m.label for m in measured] else name
            measured.append(measure(opened.model, label=label, step=step))
        facts.append(f"{label}: {name}, {count} matrices, {next(opened.model.parameters()).dtype}")
        # One model at a time in memory.
        del opened
    tables = write_measured(measured, options.out)
    page = show_page(measured, facts=[*facts, "muonwire spectra show " + " ".join(options.models)])
    path = options.out / "show.html"
    write_page(page, path)
    print_summary(measured)
    print(f"page: {path}; tables: {', '.join(map(str, tables))}")
    return 0
