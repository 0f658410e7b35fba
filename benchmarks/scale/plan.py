"""What the parts of the grid run, as data: settings, the recipes in each, and the rates and seeds that each recipe gets."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.scale.texts import DATA, task_options

from muonwire.compare.config import CompareConfig, Comparison
from muonwire.recipes import build, parse_recipe
from muonwire.tasks import build_llama

# Rates are tried on this grid, each twice the one before.
RATES = tuple(0.007 * 2.0**k for k in range(-4, 5))
# The most rates that a recipe may try in a setting, the same for every recipe.
MOST_RATES = 5
# Further seeds are run where a recipe ends within this share of the reference or the subject.
CLOSE = 0.01
SEEDS = (0, 1, 2)
DENSE = ("muon(momentum=0.9)", "muon")
# one_bit_muon in its two forms, which send as many bits: the default of fewer than eight replicas, and that of more.
SUBJECT = "one_bit_muon(interval=11)"
TURNS = "one_bit_muon(interval=3, parts=4, lengthen=True)"
# The latter at every step: a quarter of a bit, a hundredth of float32 and less.
EVERY_STEP = "one_bit_muon(interval=1, parts=4, lengthen=True)"
MAIN = (*DENSE, SUBJECT, TURNS, EVERY_STEP, "muloco")
FOUR_BITS = "muloco(codec='codebook(bits=4)', vector_codec='codebook(bits=4)')"
PEERS = ("muloco", FOUR_BITS, "sparseloco", "diloco", "demo", "signmuon")
UNCOMPRESSED = "codec='float32', vector_codec='float32', feedback=False"
# Where the search of a recipe's rate begins: its best rate in evidence/frontier.json and evidence/peers.json, at four replicas of
# eight sequences; the next higher one from so many sequences on, since what is averaged has less noise, and the next lower one of
# all recipes in models of millions of parameters.
MANY = 64
LARGE = ("micro", "mini")
USUAL = {
    "muon": 0.007,
    "muloco": 0.007,
    "signmuon": 0.007,
    "diloco": 0.0035,
    "sparseloco": 0.0035,
    "demo": 0.0035,
}
USUAL_OF_OTHERS = 0.014


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of a part: the work that its recipes do.

    Args:
        x: where it stands on the chart's axis: a number, or a name.
        recipes: in the order in which they are run.
        replicas: K.
        batch: sequences or images a replica and step.
        steps: of each run.
        size: of the Llama.
        data: a key of ``DATA``.
        seeds: the first also tunes.
    """

    x: float | str
    recipes: tuple[str, ...]
    replicas: int
    batch: int = 8
    steps: int = 1500
    size: str = "pico"
    data: str = "kjv"
    seeds: tuple[int, ...] = SEEDS

    @property
    def name(self) -> str:
        """What is the same in all its runs."""
        size = "" if DATA[self.data].images else f"-{self.size}"
        return f"{self.data}{size}-{self.replicas}x{self.batch}-{self.steps}"

    def comparison(self, recipe: str, *, runs: Path, compile: bool, texts: Path) -> Comparison:
        """That of `muonwire compare --virtual` which makes a recipe's runs."""
        made = hashlib.blake2b(made_of(recipe).encode(), digest_size=4).hexdigest()
        return CompareConfig(
            preset="full",
            recipes=(recipe,),
            lr_grid=RATES,
            seeds=self.seeds,
            replicas=self.replicas,
            batch=self.batch,
            steps=self.steps,
            evaluate_every=max(self.steps // 4, 1),
            virtual=True,
            compile=compile,
            # Runs that several parts have in common lie in one place, those of a recipe that was another one in their own.
            out=runs / self.name / made,
            **task_options(self.data, size=self.size, texts=texts),
        ).resolve()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the grid: one table and one chart.

    Args:
        title: of the chart.
        about: what its runs have in common, as a sentence or two.
        x_title: of the chart's axis.
        settings: in the order in which they are run.
        x: what the axis shows: "setting" takes it from the setting, and "bits" are those sent.
        log_x: whether the axis is logarithmic.
    """

    title: str
    about: str
    x_title: str
    settings: tuple[Setting, ...]
    x: str = "setting"
    log_x: bool = False


def _replicas(k: int, *, batch: int) -> Setting:
    return Setting(x=k, replicas=k, batch=batch, recipes=(*MAIN, *PEERS[2:]))


SIZES = ((123_200, "pico"), (459_392, "nano"), (2_705_856, "micro"), (10_245_440, "mini"))


def _sizes(k: int) -> tuple[Setting, ...]:
    return tuple(
        Setting(x=x, replicas=k, size=size, steps=500, recipes=MAIN[:5], seeds=(0,)) for x, size in SIZES
    )


INTERVALS = (11, 1, 30, 5, 100, 2)
# Steps and parts of turns, from a quarter of a bit to the 0.007 that Covenant-72B sends.
TURNS_AT = ((1, 4), (3, 4), (3, 12), (12, 12), (2, 4), (9, 4))
PARTS = {
    "replicas": Part(
        title="Loss above dense Muon by replicas, 8 sequences a replica",
        about="Each replica takes 8 sequences of 64 bytes a step, so that more replicas see more text.",
        x_title="replicas",
        log_x=True,
        settings=tuple(_replicas(k, batch=8) for k in (16, 4, 8, 2, 32, 1)),
    ),
    "total": Part(
        title="Loss above dense Muon by replicas, 64 sequences in all",
        about="The replicas share 64 sequences of 64 bytes a step.",
        x_title="replicas",
        log_x=True,
        settings=tuple(_replicas(k, batch=64 // k) for k in (16, 4, 8, 2, 32, 1)),
    ),
    "texts": Part(
        title="Loss above dense Muon by text, 16 replicas",
        about="Texts that no default was chosen on, beside the King James text.",
        x_title="text",
        settings=tuple(
            Setting(x=DATA[name].label, replicas=16, data=name, recipes=MAIN) for name in ("kjv", "python")
        ),
    ),
    "intervals": Part(
        title="Loss above dense Muon by what is sent, 8 replicas",
        about="`one_bit_muon` in turns and all at once at several intervals, and the latter without compression.",
        x_title="bits sent per parameter and step",
        x="bits",
        log_x=True,
        settings=(
            Setting(
                x="8 replicas",
                replicas=8,
                recipes=(
                    *DENSE,
                    *(f"one_bit_muon(interval={h}, parts={f}, lengthen=True)" for h, f in TURNS_AT),
                    *(f"one_bit_muon(interval={h})" for h in INTERVALS),
                    *(f"one_bit_muon(interval={h}, {UNCOMPRESSED})" for h in INTERVALS[:4]),
                ),
            ),
        ),
    ),
    "data": Part(
        title="Loss above dense Muon by data, 8 replicas",
        about="Equal data: every replica draws from all of it. Own data: each draws from a part that no other sees.",
        x_title="data",
        settings=tuple(
            Setting(x=kind.label, replicas=8, data=name, recipes=MAIN, batch=32 if kind.images else 8)
            for name, kind in DATA.items()
        ),
    ),
    "sizes": Part(
        title="Loss above dense Muon by size of the model, 8 replicas",
        about="A third of the usual length, one seed and fewer recipes: what two cores do of the largest model in hours.",
        x_title="parameters",
        log_x=True,
        settings=_sizes(8),
    ),
    "sixteen": Part(
        title="Loss above dense Muon by size of the model, 16 replicas",
        about="As the part before, at sixteen replicas, without the largest model.",
        x_title="parameters",
        log_x=True,
        settings=_sizes(16)[:3],
    ),
    "peers": Part(
        title="Loss above dense Muon by bits sent, 8 replicas",
        about="The peers with their authors' settings, and `one_bit_muon` at intervals at which it sends about as much.",
        x_title="bits sent per parameter and step",
        x="bits",
        log_x=True,
        settings=(
            Setting(
                x="8 replicas",
                replicas=8,
                recipes=(
                    *DENSE,
                    SUBJECT,
                    TURNS,
                    EVERY_STEP,
                    *PEERS,
                    *(f"one_bit_muon(interval={h}, parts={f}, lengthen=True)" for h, f in TURNS_AT[2:4]),
                    *(f"one_bit_muon(interval={h})" for h in (30, 100, 1)),
                ),
            ),
        ),
    ),
    "long": Part(
        title="Loss above dense Muon by length of the run, 8 replicas",
        about="The run of 6000 steps has one seed.",
        x_title="steps",
        log_x=True,
        settings=(
            Setting(x=1500, replicas=8, recipes=MAIN),
            Setting(x=6000, replicas=8, steps=6000, recipes=MAIN, seeds=(0,)),
        ),
    ),
}


@cache
def made_of(recipe: str) -> str:
    """The chains and intervals that a recipe stands for today: what its defaults and its code make of its name."""
    name, options = parse_recipe(recipe)
    model = build_llama("pico", vocabulary=256, sequence=64, seed=0)
    optimizer = build(name, model, lr=0.01, **options)
    groups = [(g["chain"], g.get("outer_chains", [""])[0], g["weight_decay"]) for g in optimizer.param_groups]
    return f"{groups}, {optimizer.local!r}"


def usual_rate(recipe: str, *, sequences: int, size: str) -> int:
    """Index among RATES at which the search begins, where a step of all replicas takes so many sequences or images."""
    name = recipe.partition("(")[0]
    usual = RATES.index(USUAL.get(name, USUAL_OF_OTHERS))
    return usual + (sequences >= MANY and name in USUAL) - (size in LARGE)


def smaller(
    setting: Setting,
    *,
    steps: int | None = None,
    replicas: int | None = None,
    batch: int | None = None,
    seeds: Sequence[int] | None = None,
    recipes: Sequence[str] | None = None,
) -> Setting:
    """The setting with some of it replaced, to try the commands."""
    return replace(
        setting,
        steps=steps or setting.steps,
        replicas=min(replicas or setting.replicas, setting.replicas),
        batch=batch or setting.batch,
        seeds=tuple(seeds) if seeds else setting.seeds,
        recipes=tuple(r for r in setting.recipes if not recipes or r in recipes),
    )
