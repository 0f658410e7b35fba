"""The settings of a comparison, and the presets that fill in what is not given."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from muonwire.compare.peers import parse_peer
from muonwire.compare.peers.train import PeerConfig
from muonwire.errors import UsageError
from muonwire.recipes import parse_call, parse_recipe
from muonwire.tasks import TaskSettings, TextSettings, settings_type
from muonwire.tasks.documents import COLUMN, SPLIT
from muonwire.train.config import TrainConfig
from muonwire.transport.link import Link
from muonwire.transport.site_groups import check_sites


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What decides the results of a comparison, where nothing else is given.

    Args:
        recipes, finalists, replicas, steps, lr_grid, tune_steps, seeds, link, evaluate_every: as in CompareConfig.
        task: the options of the task of all runs; tasks other than the preset's take their own defaults.
        known_rates: by recipe, what earlier searches of the whole lr_grid with exactly this preset found: the best rate, then
            others, as many for each recipe. Only these are tried. Default: none, the grid is searched.
    """

    recipes: tuple[str, ...]
    replicas: int
    steps: int
    lr_grid: tuple[float, ...]
    seeds: tuple[int, ...]
    link: str
    evaluate_every: int
    task: TaskSettings
    finalists: tuple[str, ...] | None = None
    tune_steps: int | None = None
    known_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


FINALISTS = (
    "muon",
    "one_bit_muon",
    "one_bit_muon(interval=28, growth=0.045, outer_momentum=0.5)",
    "adamw",
    "muon(momentum=0.9)",
    "muloco",
)
# Every recipe but those of the note “Why MuonFast fails on vision transformers”, which the lab trains on its images, and the
# variants that the hypotheses of “Why Muon and DisTrO conflict” ask for.
FRONTIER = (
    *FINALISTS,
    "approach_b",
    "demo",
    "sparseloco",
    "diloco",
    "distro",
    "sgd",
    "signmuon",
    "approach_a",
    "approach_d",
    "dion",
    "pre_polar",
    "approach_c",
    "approach_e",
    "approach_f",
    "psyche",
    "ef14_muon",
    "ef21_muon",
    "normuon",
    "powersgd_muon",
    "distro_weight_polar",
    "local_muon",
    "approach_b(server=True)",
    "dion(fraction=1.0)",
    "dion(fraction=0.5)",
    "dion(fraction=0.125)",
    "local_adamw",
    "sgd(momentum=0.0)",
    "approach_a(momentum=0.0)",
    "muon(adam=['mlp'])",
    "muon(adam=['self_attn'])",
    "one_bit_muon(interval=55, outer_momentum=0.5)",
)

# Short forms of the options of two tasks: the task, and its option. Those of any other task are written task(option=value).
SHORT_FORMS = {
    **{name: ("text", name) for name in ("text", "dataset", "split", "column", "tokenizer", "own_text")},
    **{name: ("text", name) for name in ("model", "model_size", "dtype", "lora", "checkpoint_activations")},
    "sequence": ("text", "sequence"),
    "images": ("vision", "data"),
    "vision_model": ("vision", "model"),
}
# What the best rate depends on, beside the recipe and the seed that tunes.
DECIDES_RATES = ("task", "replicas", "steps", "tune_steps")

PRESETS = {
    "quick": Preset(
        recipes=("adamw", "muon", "distro", "one_bit_muon"),
        replicas=4,
        steps=100,
        lr_grid=(0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03),
        # Below the first rate at which both dtypes end apart, the best one and the better of its neighbours: see evidence/demo.
        known_rates={
            "adamw": (0.003, 0.002),
            "muon": (0.02, 0.01),
            "distro": (0.01, 0.005),
            "one_bit_muon": (0.02, 0.03),
        },
        seeds=(0,),
        link="10mbit/50ms",
        evaluate_every=25,
        task=TextSettings(model_size="nano", sequence=64, batch=4),
    ),
    "full": Preset(
        recipes=("adamw", "muon", "distro", "one_bit_muon", "local_muon", "muloco"),
        replicas=4,
        steps=1500,
        lr_grid=(0.001, 0.003, 0.01, 0.03, 0.1),
        seeds=(0, 1, 2),
        link="10mbit/50ms",
        evaluate_every=50,
        task=TextSettings(model_size="nano", sequence=64, batch=8),
    ),
    "frontier": Preset(
        recipes=FRONTIER,
        finalists=FINALISTS,
        replicas=4,
        steps=1500,
        lr_grid=(0.000875, 0.00175, 0.0035, 0.007, 0.014, 0.028),
        tune_steps=250,
        seeds=(0, 1, 2),
        link="10mbit/50ms",
        evaluate_every=125,
        task=TextSettings(model_size="pico", sequence=64, batch=8),
    ),
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison of recipes on the same work.

    Every recipe gets the same start, the same batches in the same order and as many learning rates, from the same grid. The
    rates are tried with the first seed; the best one is then run with the others. What is not given comes from the preset.

    Args:
        preset: "quick" (minutes on two cores), "full" (hours), or "frontier": every recipe, rates tried in short runs.
        recipes: names, or name(option=value, ...).
        finalists: those of the recipes that are run with all seeds, the others with the first, and whose rate is sought in full
            where ``tune_steps`` is given. Default: all of them.
        task: "text", next-token prediction with a Llama, "vision", classification of small images, or a task of your own. Options
            that have no flag here are written as those of recipes: "vision(evaluation_images=500)".
        text: files of your own, text or Parquet, instead of the King James text.
        dataset, split, column: a data set of the library datasets, its split, and the column with the text.
        tokenizer: "bytes", a tokenizer.json or the folder of one, or a hub name. Default: the model's own, bytes for a preset.
        own_text: each replica draws from its own part of the training text instead of all of it.
        model: a causal language model of transformers, as `muonwire train` takes it. Default: the Llama of model_size.
        model_size: preset of the Llama.
        dtype: of the weights, float32 or bfloat16.
        lora: rank of adapters, which alone are trained and exchanged; 0: none.
        checkpoint_activations: compute activations anew in the backward pass instead of keeping them.
        sequence: tokens a sequence.
        images: folder with MNIST's four IDX files, for the vision task. Default: 5,000 digits of MNIST.
        vision_model: "vit", "resnet", "vit_pico" or "resnet_pico". Default: "vit".
        batch: sequences or images a replica and step. Default: the preset's for text, 32 images.
        replicas: processes that train together.
        steps: optimizer steps of each run.
        lr_grid: peak learning rates to try. Default: the preset's; of its grid, which was searched before, "quick" tries two for
            each recipe as long as nothing that decides the rate is changed.
        tune_steps: steps of short runs that try rates first, from the middle of the grid outwards until the best one has
            neighbours. Longer runs want lower rates: finalists then run it and the two next lower ones in full, and the best of
            them with all seeds; other recipes run the next lower one. Default: the whole grid is run in full.
        seeds: of start and data; the first also tunes.
        peers: other libraries' own training beside the recipes, with the same learning rates: ddp_adamw, ddp_muon or
            torchft_diloco, or name(option=value, ...). Their bytes are counted by the kernel, which takes network namespaces.
        link: rate and latency for the modelled time, such as 10mbit/50ms, or 20mbit:200mbit/40ms for rates up and down apart.
            Default: the first of --emulate, or the preset's.
        emulate: links of that form; on each, every recipe is trained again at its best rate, each replica on a host of its own in
            network namespaces, until it reaches the loss at which the first recipe ended, and the time is measured. Where
            namespaces are not allowed, a warning says so and the times at these links are modelled. See docs/emulate.md.
        emulate_recipes: the recipes and peers that are trained on these links, where some would take too long; the others' times
            are modelled. Default: all.
        evaluate_every: steps between evaluations.
        out: folder of the comparison.
        threads: of each replica's arithmetic. Default: its share of the cores.
        port: of the rendezvous. Default: any free one.
        virtual: replicas of a run are threads of one process that take turns, and runs go side by side: the same losses and
            bytes, to the last bit, in less time where replicas outnumber cores.
        jobs: runs side by side with --virtual. Default: the number of cores.
        sites: the replicas make so many sites of equally many, dense inside and one exchange between them; bytes are then those
            between sites. Default: every replica is by itself.
        compile: run the models through torch.compile; it needs a C++ compiler on a CPU.
    """

    preset: str = "quick"
    recipes: tuple[str, ...] | None = None
    finalists: tuple[str, ...] | None = None
    task: str = "text"
    text: tuple[Path, ...] = ()
    dataset: str | None = None
    split: str = SPLIT
    column: str = COLUMN
    tokenizer: str | None = None
    own_text: bool = False
    model: str | None = None
    model_size: str | None = None
    dtype: str = "float32"
    lora: int = 0
    checkpoint_activations: bool = False
    sequence: int | None = None
    images: Path | None = None
    vision_model: str | None = None
    batch: int | None = None
    replicas: int | None = None
    steps: int | None = None
    lr_grid: tuple[float, ...] | None = None
    tune_steps: int | None = None
    seeds: tuple[int, ...] | None = None
    peers: tuple[str, ...] = ()
    link: str | None = None
    emulate: tuple[str, ...] = ()
    emulate_recipes: tuple[str, ...] | None = None
    evaluate_every: int | None = None
    out: Path = Path("runs/compare")
    threads: int | None = None
    port: int = 0
    virtual: bool = False
    jobs: int | None = None
    sites: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UsageError(f"compare: preset is {self.preset!r}; allowed are {', '.join(PRESETS)}")
        self._task_settings()

    def _task_settings(self) -> TaskSettings:
        """The task with the options that are given, in short or with its name, and the preset's or its own where none is."""
        name, options = parse_call(self.task, what="task", example="vision(batch=8)")
        kind, preset = settings_type(name), PRESETS[self.preset]
        given = [n for n in SHORT_FORMS if getattr(self, n) != getattr(type(self), n)]
        misplaced = [n for n in given if SHORT_FORMS[n][0] != kind.name]
        if misplaced:
            raise UsageError(
                f"compare: {', '.join(misplaced)} belong to --task {SHORT_FORMS[misplaced[0]][0]}, but the task is {name}; "
                "leave them out"
            )
        default = dict(asdict(preset.task) if preset.task.name == kind.name else kind.compared)
        short = {SHORT_FORMS[n][1]: getattr(self, n) for n in given}
        if {**short, **options}.get("model") is not None:
            # The preset's size is of the model that it builds itself.
            default.pop("model_size", None)
        batch = {} if self.batch is None else {"batch": self.batch}
        return kind.read({**default, **short, **batch, **options})

    def resolve(self) -> "Comparison":
        """Everything filled in from the preset, and checked.

        Raises:
            UsageError: what is not allowed.
        """
        preset = PRESETS[self.preset]
        wanted = {f.name for f in fields(Comparison)}
        given = {name: v for name, v in vars(self).items() if name in wanted and v is not None}
        if self.recipes is not None:
            # The preset's finalists belong to its own recipes.
            given["finalists"] = self.finalists
        if self.emulate and self.link is None:
            given["link"] = self.emulate[0]
        chosen = {**vars(preset), **given, "task": self._task_settings(), "known_rates": {}}
        chosen["recipes"] = (*chosen["recipes"], *self.peers)
        comparison = Comparison(**chosen)
        as_searched = (
            self.lr_grid is None
            and self.sites is None
            and all(getattr(comparison, name) == getattr(preset, name) for name in DECIDES_RATES)
        )
        known = {r: preset.known_rates[r] for r in comparison.recipes if r in preset.known_rates}
        # Where the rates of one recipe are not known, all get the whole grid: as many tries for each.
        if not as_searched or comparison.seeds[0] != preset.seeds[0] or len(known) < len(comparison.recipes):
            return comparison
        return replace(comparison, known_rates=known)


@dataclass(frozen=True, kw_only=True)
class Comparison(Preset):
    """A comparison with everything filled in: what decides its results, and where and how it is run, as in CompareConfig.

    Raises:
        UsageError: an empty or repeating list, no replica, a link that does not parse, or a run that is not allowed.
    """

    out: Path
    threads: int | None = None
    port: int
    virtual: bool
    jobs: int | None = None
    compile: bool
    sites: int | None = None
    # Those of the recipes that are peers.
    peers: tuple[str, ...] = ()
    emulate: tuple[str, ...] = ()
    emulate_recipes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("recipes", "lr_grid", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UsageError(f"compare: {name} is {values}; give at least one, each once")
        self._check_links()
        for name in ("finalists", "emulate_recipes"):
            unknown = [r for r in getattr(self, name) or () if r not in self.recipes]
            if unknown:
                raise UsageError(
                    f"compare: {name} {', '.join(unknown)} are not among the recipes, {', '.join(self.recipes)}"
                )
        if self.replicas < 1:
            raise UsageError(f"compare: replicas is {self.replicas}; at least 1 is needed")
        if self.sites is not None:
            check_sites(self.replicas, self.sites)
            if self.peers or self.emulate:
                raise UsageError(
                    "compare: --sites cannot go with --emulate or --peers, which have a host for each replica; leave one out"
                )
        if self.tune_steps is not None and not 1 <= self.tune_steps <= self.steps:
            raise UsageError(
                f"compare: tune_steps is {self.tune_steps}; it must lie between 1 and steps, {self.steps}"
            )
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"compare: jobs is {self.jobs}; at least 1 is needed")
        for recipe in self.recipes:
            for lr in self.lr_grid:
                self.run_config(recipe, lr, self.seeds[0])
                self.run_config(recipe, lr, self.seeds[0], tuning=True)

    def _check_links(self) -> None:
        Link.parse(self.link)
        links = tuple(str(Link.parse(text)) for text in self.emulate)
        if len(set(links)) < len(links):
            raise UsageError(f"compare: emulate is {self.emulate}; give each link once")
        object.__setattr__(self, "emulate", links)
        if self.emulate_recipes is not None and not links:
            raise UsageError(
                "compare: emulate_recipes is given without emulate; name a link, such as --emulate 10mbit/40ms"
            )
        if links and self.virtual:
            raise UsageError(
                "compare: --virtual makes the replicas threads of one process, which --emulate cannot put on hosts of their own; "
                "leave one of them out (what a first call with --virtual has finished in --out is kept by one with --emulate)"
            )
        for option in ("peers", "emulate"):
            if getattr(self, option) and self.replicas < 2:
                raise UsageError(f"compare: {option} needs replicas that talk; replicas is {self.replicas}")

    def seeds_of(self, recipe: str) -> tuple[int, ...]:
        """The seeds that ``recipe`` is run with at its best rate."""
        return self.seeds if self.is_finalist(recipe) else self.seeds[:1]

    def is_finalist(self, recipe: str) -> bool:
        """Whether ``recipe`` is run with all seeds, and its rate sought in full."""
        return self.finalists is None or recipe in self.finalists

    def rates_of(self, recipe: str) -> tuple[float, ...]:
        """The rates that are tried for ``recipe``: the grid, or what an earlier search left of it."""
        return self.known_rates.get(recipe, self.lr_grid)

    def at_edge(self, recipe: str, lr: float) -> bool:
        """Whether better rates may lie beyond ``lr``, the best one that was tried, since no search showed them to be worse."""
        tried = self.rates_of(recipe)
        if len(self.lr_grid) > 1 and lr in (min(self.lr_grid), max(self.lr_grid)):
            return True
        return recipe in self.known_rates and lr != tried[0] and lr in (min(tried), max(tried))

    def steps_of(self, *, tuning: bool) -> int:
        """The steps of a run, which may be one of those that only try a rate."""
        return self.tune_steps if tuning and self.tune_steps else self.steps

    def options_of(self, recipe: str) -> dict[str, Any]:
        """The options in the text of a recipe or a peer."""
        return (parse_peer if recipe in self.peers else parse_recipe)(recipe)[1]

    def run_config(
        self, recipe: str, lr: float, seed: int, *, tuning: bool = False
    ) -> TrainConfig | PeerConfig:
        """The settings of one run, of a recipe or a peer, which may be one of those that only try a rate."""
        steps = self.steps_of(tuning=tuning)
        same_work: dict[str, Any] = {
            "lr": lr,
            "seed": seed,
            "steps": steps,
            "warmup_steps": max(steps // 20, 1),
            "evaluate_every": self.evaluate_every,
            "compile": self.compile,
            "task": self.task,
        }
        if recipe in self.peers:
            return PeerConfig(peer=recipe, **same_work)
        return TrainConfig(
            recipe=recipe,
            checkpoint_every=250,
            digest_every=max(steps // 4, 1),
            tensorboard=False,
            sites=self.sites,
            **same_work,
        )
