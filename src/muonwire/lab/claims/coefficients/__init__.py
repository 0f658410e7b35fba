"""Claims of the note “Coefficients and variance of Muon”."""

from muonwire.lab.engine.claim import Note

NOTE = Note(
    title="Coefficients and variance of Muon",
    about="How near tuned coefficients of Newton–Schulz come to the polar factor, how fast, "
    "and what orthogonalizing does to the variance of gradients.",
)
