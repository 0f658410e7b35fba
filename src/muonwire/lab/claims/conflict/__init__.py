"""Claims of the note “Why Muon and DisTrO conflict”."""

from muonwire.lab import Note

NOTE = Note(
    title="Why Muon and DisTrO conflict",
    about="Compressing destroys what orthogonalization makes; six ways around it, and three guesses which is best.",
)
