"""The page of models beside each other: their predictions of text and their answers."""

from collections.abc import Sequence
from statistics import fmean

from muonwire.pages import Column, Listing, Listings, Page, Section, Table, text_table
from muonwire.pages.units import count_text, number_text, percent_text
from muonwire.spectra.likeness import Likeness
from muonwire.spectra.talk import Answer


def compare_page(
    labels: Sequence[str],
    likenesses: Sequence[Likeness],
    answers: Sequence[Sequence[Answer]],
    *,
    text: str,
    facts: Sequence[str] = (),
) -> Page:
    """The page.

    Args:
        labels: of the models, the original first.
        likenesses: of each.
        answers: of each, to the same prompts.
        text: what was predicted, such as "the King James text".
        facts: short facts about how the figures were made.
    """
    return Page(
        title=" and ".join((", ".join(labels[:-1]), labels[-1])) if len(labels) > 1 else labels[0],
        kicker="muonwire spectra compare",
        lead=f"How well each predicts {text}, how far its next-token distributions are from those of {labels[0]}, and what each "
        "says to the same prompts with the same random numbers.",
        facts=tuple(facts),
        sections=(
            Section(
                title="Predicting text",
                anchor="text",
                blocks=(likeness_table(labels, likenesses), answers_table(labels, answers)),
            ),
            Section(title="Conversations", anchor="conversations", blocks=conversations(labels, answers)),
        ),
    )


def likeness_table(labels: Sequence[str], likenesses: Sequence[Likeness]) -> Table:
    """Loss, perplexity, KL and agreement of each model."""
    return text_table(
        f"On {count_text(likenesses[0].num_tokens)} tokens of real text",
        (
            "Model",
            Column(label="Loss", unit="nats a token"),
            "Perplexity",
            Column(label="KL to the first", unit="nats a token"),
            "Same most likely token",
        ),
        (
            (label, f"{x.loss:.4f}", number_text(x.perplexity), f"{x.kl:.4f}", percent_text(x.agreement))
            for label, x in zip(labels, likenesses, strict=True)
        ),
    )


def answers_table(labels: Sequence[str], answers: Sequence[Sequence[Answer]]) -> Table:
    """Length and repetition of each model's answers."""
    rows = []
    for label, its_answers in zip(labels, answers, strict=True):
        lengths = [a.num_tokens for a in its_answers]
        rows.append(
            (
                label,
                f"{fmean(lengths):.1f}",
                f"{min(lengths)} to {max(lengths)}",
                f"{sum(a.ended for a in its_answers)} of {len(its_answers)}",
                percent_text(fmean(a.repetition for a in its_answers)),
            )
        )
    columns = (
        *("Model", "Tokens, mean", "Shortest to longest"),
        *("Ended by itself", "Repeated runs of four tokens"),
    )
    return text_table(f"Over {len(answers[0])} answers", columns, rows)


def conversations(labels: Sequence[str], answers: Sequence[Sequence[Answer]]) -> tuple[Listings, ...]:
    """The models' answers to each prompt, side by side."""
    return tuple(
        Listings(
            listings=tuple(
                Listing(
                    title=label,
                    text=f"> {answer.prompt}\n\n{answer.text.strip()}",
                    detail=f"{answer.num_tokens} tokens, {'ended by itself' if answer.ended else 'cut off'}",
                )
                for label, answer in zip(labels, to_one_prompt, strict=True)
            )
        )
        for to_one_prompt in zip(*answers, strict=True)
    )
