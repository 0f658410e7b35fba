"""`muonwire spectra`."""

from muonwire.cli.groups import Group

ACTIONS = {
    "show": (
        "muonwire.cli.spectra.show",
        "singular values of every weight matrix, of one model or of several",
    ),
    "edit": ("muonwire.cli.spectra.edit", "change singular values and write the model"),
    "compare": ("muonwire.cli.spectra.compare", "perplexity, KL and answers of models beside each other"),
    "sweep": ("muonwire.cli.spectra.sweep", "many edits at several strengths against perplexity and KL"),
    "chat": ("muonwire.cli.spectra.chat", "talk to models side by side"),
}
main = Group(
    name="spectra",
    arguments="ACTION MODEL... [options]",
    actions=ACTIONS,
    notes=(
        "MODEL is a folder of transformers, a GGUF file, a run or checkpoint of `muonwire train`, a hub name, or smollm2.",
    ),
    examples=(
        "muonwire spectra show smollm2",
        "muonwire spectra edit smollm2 --edit 'clip(high=2.0)' --out runs/spectra/clipped",
        "muonwire spectra compare smollm2 runs/spectra/clipped",
        "muonwire spectra edit --help",
    ),
).main
