"""Singular values of trained weights: read, edit and measure them, and talk to the edited models."""

from muonwire.spectra.edit import Edited, edit_model, read_record, write_model
from muonwire.spectra.edits import EDITS, Edit, parse_edit, parse_edits
from muonwire.spectra.likeness import Likeness, Reference, text_windows
from muonwire.spectra.measure import MEASURES, Measured, Spectrum, measure, singular_values, spectrum
from muonwire.spectra.models import PACKAGED, Opened, open_model
from muonwire.spectra.sweep import SWEEP, Point, sweep
from muonwire.spectra.talk import Answer, Sampling, answer, stream
from muonwire.spectra.weights import Choice, Weight, weights_of

__all__ = [
    "EDITS",
    "MEASURES",
    "PACKAGED",
    "SWEEP",
    "Answer",
    "Choice",
    "Edit",
    "Edited",
    "Likeness",
    "Measured",
    "Opened",
    "Point",
    "Reference",
    "Sampling",
    "Spectrum",
    "Weight",
    "answer",
    "edit_model",
    "measure",
    "open_model",
    "parse_edit",
    "parse_edits",
    "read_record",
    "singular_values",
    "spectrum",
    "stream",
    "sweep",
    "text_windows",
    "weights_of",
    "write_model",
]
