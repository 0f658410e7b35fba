"""Claims of the note “Why MuonFast fails on vision transformers”."""

from muonwire.lab.engine.claim import Note

NOTE = Note(
    title="Why MuonFast fails on vision transformers",
    about="Why a small vision transformer does not train with a Muon whose learning rate is inside the polar factor, "
    "and how to mend it.",
)
