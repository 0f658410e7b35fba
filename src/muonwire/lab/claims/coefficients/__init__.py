"""Claims of the note “Coefficients and variance of Muon”, and the names that their rows share."""

from muonwire.lab import Note

NOTE = Note(
    title="Coefficients and variance of Muon",
    about="How near tuned coefficients of Newton–Schulz come to the polar factor, how fast, "
    "and what orthogonalizing does to the variance of gradients.",
)
# What is orthogonalized. The note names 4096×4096; its error figures are those of 512×512 (see ``orthogonality_error``).
FIGURES, STATED, REAL = "Gaussian, the size of its figures", "Gaussian, the size it states", "real momentum"
# Schedules of the library: the note’s standard iteration and its tuned one.
STANDARD, TUNED = "taylor_cubic", "tuned"
