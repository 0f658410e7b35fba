"""Claims of the note “The failed integration of Muon and DisTrO”."""

from muonwire.lab import Note

NOTE = Note(
    title="The failed integration of Muon and DisTrO",
    about="Tables of what a DCT codec does to random matrices before and after orthogonalization, and what was left to try.",
)
