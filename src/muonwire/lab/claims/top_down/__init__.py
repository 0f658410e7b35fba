"""Claims of the note “Muon from the top down”."""

from muonwire.lab import Note

NOTE = Note(
    title="Muon from the top down",
    about="Why a well-conditioned weight should train better, how to orthogonalize one, and what to try on a small language model.",
)
