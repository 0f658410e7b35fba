"""future.2: other compressors may suit Muon better than DCT and top-k."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from muonwire import codec
from muonwire.codec import Pipeline
from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting, Value
from muonwire.lab.claims.integration import NOTE
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import cosine, departure
from muonwire.polar.quality import exact_factor

# Bits an entry. The first is about DisTrO's k=32 of 64×64 at one bit.
BUDGETS = (0.1, 0.5)
SIZE = 64
SEARCHES = 9
SMALLEST = 1e-4
# Searching the amounts takes hundreds of encodings a matrix, so that each seed has fewer of them.
NUM_PARTS = 10

# From an amount in (0, 1] to a codec whose bytes grow with it, for a matrix whose smaller dimension is given.
Family = Callable[[float, int], str]
DCT, PROJECTION, LOW_RANK = "DCT top-k", "random projection", "low rank"
FAMILIES: dict[str, Family] = {
    DCT: lambda a, r: f"dct(chunk=64) | topk(density={a}) | sign(scale=chunk)",
    "top-k": lambda a, r: f"topk(density={a}) | sign(scale=tensor)",
    PROJECTION: lambda a, r: f"projection(density={a}) | sign(scale=chunk)",
    "n of m": lambda a, r: f"nm(n=1, m={max(1, round(1 / a))}) | sign(scale=tensor)",
    "4×4 blocks": lambda a, r: f"topblocks(size=4, density={a}) | sign(scale=tensor)",
    "rows": lambda a, r: f"toprows(density={a}) | sign(scale=tensor)",
    "random-k": lambda a, r: f"randomk(density={a}) | sign(scale=tensor)",
    LOW_RANK: lambda a, r: (
        f"lowrank(rank={max(1, round(a * r))}, method=rsvd, iterations=2) | int(bits=4, scale=chunk)"
    ),
}
STRUCTURED = ("n of m", "4×4 blocks", "rows")
LANGUAGE = "language-model momentum"
NAMES = {"projection": "random projection", "structured": "structured sparsity"}
ORDERS = {"first": "orthogonalized, then sent", "after": "sent, then orthogonalized"}


def _bits(chosen: Pipeline, x: Tensor, seed: int) -> float:
    return 8 * len(chosen.encode_body(x, seed=seed).body) / x.numel()


def _within(family: Family, x: Tensor, budget: float, seed: int) -> Pipeline:
    """The codec of the family with the most bytes that are within the budget, or the smallest of all."""

    def at(amount: float) -> Pipeline:
        return codec.parse(family(amount, min(x.shape)))

    low, high = SMALLEST, 1.0
    for _ in range(SEARCHES):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _bits(at(middle), x, seed) <= budget else (low, middle)
    return at(low)


def _rows(x: Tensor, data: str, *, budgets: Sequence[float], seed: int) -> Iterator[Row]:
    u = exact_factor(x).float()
    for budget in budgets:
        found: dict[str, dict[str, float]] = {}
        for name, family in FAMILIES.items():
            plain, first = (_within(family, sent, budget, seed) for sent in (x, u))
            decoded = plain.encode_body(x, seed=seed).decoded
            of_factor = first.encode_body(u, seed=seed).decoded
            found[name] = {
                "bits": _bits(plain, x, seed),
                "original": cosine(decoded, x),
                "after": cosine(exact_factor(decoded).float(), u),
                "first": cosine(of_factor, u),
                "again": cosine(exact_factor(of_factor).float(), u),
                "departure": departure(of_factor),
            }
        where: dict[str, Value] = {"data": data, "budget": budget}
        for name, values in found.items():
            yield {**where, "codec": name, **values}
        for order in ORDERS:
            reference = found[DCT][order]
            yield {
                **where,
                "order": ORDERS[order],
                "projection": found[PROJECTION][order] - reference,
                "structured": max(found[name][order] for name in STRUCTURED) - reference,
                "low rank": found[LOW_RANK][order] - reference,
            }


def measure(setting: Setting) -> Iterator[Row]:
    """Cosines and orthogonality of every family of codecs, each with the amount that fits the same bytes.

    Bytes are those of one tensor's body as it goes on the wire; what is common to the tensors of a message is left out.
    """
    budgets, seed = setting.pick(BUDGETS, BUDGETS[:1]), setting.seed
    yield from _rows(gaussian(setting, SIZE, SIZE), f"Gaussian {SIZE}×{SIZE}", budgets=budgets, seed=seed)
    for data, x in real_samples(setting, num_parts=NUM_PARTS):
        yield from _rows(x, data, budgets=budgets, seed=seed)


def _better(column: str, data: str, order: str) -> Check:
    place = "before" if order == "after" else "after"
    return Check(
        name=f"{NAMES[column]} has a higher cosine to the polar factor than DCT top-k at {BUDGETS[0]:g} bit an entry",
        setting=f"{column}, {data}, {ORDERS[order]}",
        column=column,
        select={"data": data, "order": ORDERS[order], "budget": BUDGETS[0]},
        at_least=0.0,
        possible=(-2.0, 2.0),
        unit="more",
        reading=Reading(
            holds="at equal bytes DCT top-k loses",
            fails="at equal bytes DCT top-k wins",
            by="by {size} of cosine",
            where=f"against {NAMES[column]} {place} orthogonalizing",
        )
        if data == LANGUAGE
        else None,
    )


CLAIM = Claim(
    id="future.2",
    note=NOTE,
    says="Muon may work with compressors that keep more of a gradient's structure, such as random projection and "
    "structured sparsity",
    question="At equal bytes on the wire, which codec gives the update nearest to the polar factor: orthogonalized "
    "before sending, and orthogonalized after?",
    expected="Not random projection, which keeps a share of the energy equal to its density where top-k keeps several times "
    "that. Structured sparsity saves bits of positions and loses on what it must take along. Low rank where the gradient's rank "
    "is low, when orthogonalizing comes after: it keeps whole singular directions, which a polar factor then has right.",
    measure=measure,
    inputs=MATRICES,
    checks=tuple(
        _better(column, data, order)
        for column in NAMES
        for data, order in (("training momentum", "after"), (LANGUAGE, "after"), (LANGUAGE, "first"))
    ),
    meaning={
        "confirmed": "Try a random projection and structured sparsity first.",
        "refuted": "Try neither random projection nor structured sparsity first; see the tables for plain top-k and low rank.",
        "depends": "Choose by the tables, which have every codec in both orders, plain top-k and low rank among them.",
    },
    tables=(
        Pivot(
            caption="At equal bytes: bits an entry (low rank can't go below rank 1), cosine of the decoded to the "
            "matrix, and to the polar factor: of the polar factor of the decoded, of the decoded polar factor, and "
            "of that orthogonalized again; departure of the decoded polar factor from orthogonality (0 orthogonal)",
            rows={"data": "Data", "budget": "Budget, bits", "codec": "Codec"},
            values={
                "bits": "Bits",
                "original": "cos to X",
                "after": "polar after",
                "first": "polar first",
                "again": "first and again",
                "departure": "Departure",
            },
        ),
        Pivot(
            caption="Cosine to the polar factor, more than DCT top-k",
            rows={"data": "Data", "budget": "Budget, bits", "order": "Order"},
            values={
                "projection": "Random projection",
                "structured": "Best structured",
                "low rank": "Low rank",
            },
        ),
    ),
    plots=tuple(
        Plot(
            name=order,
            title=title,
            how_to_read="Higher is nearer to what Muon would have applied.",
            x=("codec", "codec"),
            y=(order, "cosine to the polar factor"),
            series=("data", "Data"),
            mark="bar",
            select={"budget": BUDGETS[0]},
        )
        for order, title in (
            ("after", "Sent at 0.1 bit an entry, then orthogonalized: cosine to the polar factor"),
            ("first", "Orthogonalized, then sent at 0.1 bit an entry: cosine to the polar factor"),
        )
    ),
)
