"""The textual form of codecs: "dct(chunk=64) | topk(k=32) | sign(scale=chunk)"."""

import re
from dataclasses import fields
from typing import Any

from muonwire.codec import table
from muonwire.codec.pack import Pack
from muonwire.codec.part import Part
from muonwire.codec.pipeline import Pipeline
from muonwire.codec.quantize import Quantize
from muonwire.codec.select import Select
from muonwire.codec.transform import Transform
from muonwire.errors import UsageError
from muonwire.literals import read_literal

# Each part by its name: those of codec/table.py, and what a program adds.
PARTS: dict[str, type[Part]] = {
    part.name: part for line, part in vars(table).items() if not line.startswith("_")
}
# Packers of version 0.1 that nothing sent unless it was asked to by name.
REMOVED_PACKERS = ("bitmap", "bits", "rice")
_SLOTS: tuple[tuple[str, type[Part]], ...] = (
    ("transform", Transform),
    ("select", Select),
    ("quantize", Quantize),
    ("pack", Pack),
)
_PART = re.compile(r"(?P<name>\w+)(?:\((?P<options>.*)\))?")


def _value(text: str) -> Any:
    try:
        return read_literal(text)
    except (ValueError, SyntaxError):
        return text


def _part(text: str) -> Part:
    match = _PART.fullmatch(text.strip())
    if match is not None and match["name"] in REMOVED_PACKERS:
        raise UsageError(
            f"codec: {match['name']!r} is a packer of muonwire 0.1; leave it out, and positions go by 'ans' at their entropy. "
            "Payloads that name it are read by muonwire 0.1"
        )
    if match is None or match["name"] not in PARTS:
        raise UsageError(f"codec: {text.strip()!r} is not a part; allowed are {', '.join(PARTS)}")
    kind = PARTS[match["name"]]
    allowed = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    options = {}
    for item in filter(None, (o.strip() for o in (match["options"] or "").split(","))):
        key, separator, value = item.partition("=")
        if not separator or key.strip() not in allowed:
            raise UsageError(
                f"codec: {item!r} is not an option of {match['name']}; allowed are {', '.join(allowed) or 'none'}, "
                "written name=value"
            )
        options[key.strip()] = _value(value.strip())
    try:
        return kind(**options)
    except TypeError as error:
        raise UsageError(f"codec: {text.strip()!r} does not make a {match['name']}: {error}") from error


def parse(text: str) -> Pipeline:
    """Read the textual form of a codec: parts in the order transform, select, quantize, pack, each of which may be left out.

    >>> str(parse("dct(chunk=64) | topk(k=32) | sign(scale=chunk)"))
    'dct(chunk=64) | topk(k=32) | sign(scale=chunk)'
    >>> parse(str(parse("topk(density=0.05)|sign"))) == parse("topk(density=0.05) | sign(scale=tensor)")
    True

    Raises:
        UsageError: an unknown part or option, a bad value, or parts in another order.
    """
    slots: dict[str, Part] = {}
    position = 0
    for piece in text.split("|"):
        part = _part(piece)
        slot = next(i for i, (_, kind) in enumerate(_SLOTS) if isinstance(part, kind))
        if slot < position:
            raise UsageError(
                f"codec: {text!r}: {part} comes too late; the order is transform | select | quantize | pack"
            )
        position = slot + 1
        slots[_SLOTS[slot][0]] = part
    return Pipeline(**slots)  # type: ignore[arg-type]
