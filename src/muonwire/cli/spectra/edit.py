"""`muonwire spectra edit`."""

from dataclasses import dataclass
from pathlib import Path

from muonwire.cli.arguments import command
from muonwire.cli.progress import bench_bar
from muonwire.cli.spectra.options import Model, Place, check_count
from muonwire.spectra.edit import check_target, edit_model, num_edited, write_model
from muonwire.spectra.edits import parse_edits


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


@command(
    SpectraEdit,
    name="spectra edit",
    about="Change the singular values of a model and write it as an ordinary transformers folder.",
    examples=(
        "muonwire spectra edit smollm2 --edit 'clip(high=2.0)' --out runs/spectra/clipped",
        "muonwire spectra edit smollm2 --edit \"keep(fraction=0.5, kind='mlp')\" \"polar(kind='q_proj', layers='0-9')\"",
        "muonwire spectra edit runs/muon --edit 'flatten(power=0.5)'",
        "muonwire spectra edit smollm2 --out runs/spectra/copy   # no edit: a copy",
    ),
)
def main(options: SpectraEdit) -> int:
    """Edit the model and write it; returns the exit code."""
    check_count([options.model] if options.model else [], 1, action="edit")
    edits = parse_edits(options.edit)
    opened = options.place.open(options.model)
    check_target(opened, options.out, overwrite=options.overwrite)
    with bench_bar(opened.label, total=num_edited(opened.model, edits)) as step:
        edited = edit_model(opened.model, edits, step=step)
    path = write_model(opened, options.out, edits=edits, edited=edited, overwrite=options.overwrite)
    print(f"{len(edited)} matrices edited: {' then '.join(map(str, edits)) or 'no edit'}")
    if edited:
        most = max(edited, key=lambda matrix: matrix.moved)
        print(f"moved most: {most.name} by {100 * most.moved:.1f} % of its Frobenius norm")
    print(f"model: {path}; talk to both: muonwire spectra chat {options.model} {path}")
    return 0
