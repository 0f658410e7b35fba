"""`muonwire spectra chat`."""

import sys
from dataclasses import dataclass

from muonwire.cli.arguments import command
from muonwire.cli.spectra.options import Models, Place, check_count, labels_of
from muonwire.spectra.chat import chat
from muonwire.spectra.talk import Sampling


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


@command(
    SpectraChat,
    name="spectra chat",
    about="Talk to one model, or to several side by side; an empty line or Ctrl-D ends it, /new forgets what was said.",
    examples=(
        "muonwire spectra chat smollm2 runs/spectra/edited",
        "echo 'Who are you?' | muonwire spectra chat smollm2 --temperature 0",
    ),
)
def main(options: SpectraChat) -> int:
    """Talk until the input ends; returns the exit code."""
    check_count(options.models, 1, action="chat")
    models = [options.place.open(name) for name in options.models]
    chat(models, labels_of(models), options.sampling, lines=sys.stdin)
    return 0
