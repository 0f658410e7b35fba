"""The recipe that muonwire recommends: local Muon whose weight changes travel as one bit an entry."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from torch import nn
from typing_extensions import override

from muonwire.codec import Turns
from muonwire.optim.auto_interval import Interval
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import checked
from muonwire.recipes.define import recipe
from muonwire.recipes.dense import normalized_chain
from muonwire.recipes.describe import default_of
from muonwire.recipes.local import LocalMuonSettings, with_muon_inside
from muonwire.stages import Chain

# From so many replicas on the defaults are those that docs/one_bit_muon.md#with-many-replicas derives.
MANY = 8
PARTS_OF_MANY = 4
# F · H is about this: 1 / 11 bit an entry and step, below 0.1 with headers.
SPACING = 11
# What says how replicas synchronize; where any of it is given, the number of replicas decides nothing.
_OF_SYNCHRONIZATION = (
    "interval",
    "growth",
    "parts",
    "codec",
    "feedback",
    "feedback_decay",
    "over",
    "lengthen",
    "fragments",
    "delay",
    "merge",
    "means",
)


@dataclass(frozen=True, kw_only=True)
class OneBitMuonSettings(LocalMuonSettings):
    """Options of one_bit_muon, with the defaults that docs/one_bit_muon.md derives.

    Args:
        interval: H, local steps a synchronization. Default: 11 / parts, rounded up, so that less than 0.1 bit is sent with headers.
            For 0.02 bit over 1500 steps and few replicas: 28, with growth=0.045 and outer_momentum=0.5.
        parts: F; in a synchronization each replica sends one of F parts of the entries, other replicas the others, in turns. So
            R / F of R replicas send an entry, which moves by their mean; nothing is kept for later. Bits are 1 / (F H), so H can
            be F times shorter, which gains with many replicas. Of fewer than F replicas each sends one of as many parts as there
            are replicas. Default: 1, all send all; 4 from eight replicas on that do not come and go, where nothing else is given
            of how they synchronize.
        codec: of matrices, without a selection with ``parts``. Default: "sign(scale=tensor)", the sign of every entry and one
            mean magnitude a tensor.
        lengthen: give the mean, which is shorter than the changes of replicas that disagree, their length (u ← u · ℓ / ‖u‖, ℓ that
            of their own changes in the mean, for each tensor). Default: with parts.
        normalize_rows: bring each polar factor's rows to about the same size over the steps, as NorMuon does. Default: False.
        row_beta2: with normalize_rows, decay of the rows' mean squares, in [0, 1). Default: 0.95.
        momentum: β of the local steps. Default: 0.9, less than dense Muon's, since the kept residual is momentum too.
        feedback_decay: of what is kept, in [0, 1]. Default: 0.5; what is older than a few rounds points to where the weights no
            longer are.
        outer_momentum: of the outer step, in [0, 1); 0 is none. Default: 0.3; 0.5 does better where H is several times larger.
        mean_prediction: see MeansSettings. Default: 0.5, at which recompressed means cost the least in loss (docs/owners.md).
    """

    # None stands for what follows from the other options and the number of replicas; made settings hold that.
    interval: Interval | None = None  # type: ignore[assignment]
    parts: int | None = None
    codec: str = "sign(scale=tensor)"
    lengthen: bool | None = None  # type: ignore[assignment]
    normalize_rows: bool = False
    row_beta2: float = 0.95
    momentum: float = 0.9
    feedback_decay: float = 0.5
    outer_lr: float = 0.9
    outer_momentum: float = 0.3
    mean_prediction: float = 0.5

    def __post_init__(self) -> None:
        if self.parts is None:
            object.__setattr__(self, "parts", self._usual_parts())
        if self.lengthen is None:
            object.__setattr__(self, "lengthen", self.num_parts > 1)
        if self.interval is None:
            object.__setattr__(self, "interval", self.usual_interval())
        super().__post_init__()

    def _usual_parts(self) -> int:
        """Those that the number of replicas asks for, where nothing else is given."""
        transport = self.transport
        if transport is None or transport.elastic or transport.world_size < MANY:
            return 1
        given = any(
            getattr(self, f.name) != default_of(f) for f in fields(self) if f.name in _OF_SYNCHRONIZATION
        )
        return 1 if given else PARTS_OF_MANY

    @property
    def num_parts(self) -> int:
        """F."""
        return 1 if self.parts is None else self.parts

    @override
    def usual_interval(self) -> int:
        return -(-SPACING // self.num_parts) if self.num_parts > 0 else SPACING

    @override
    def idle(self) -> Mapping[str, str]:
        plain = {} if self.normalize_rows else {"row_beta2": "with normalize_rows=True"}
        turns = (
            dict.fromkeys(("feedback", "feedback_decay", "over"), "with parts=1")
            if self.num_parts > 1
            else {}
        )
        return {**super().idle(), **plain, **turns}

    @checked
    @override
    def outer_chains(self) -> list[Chain]:
        """With ``parts`` the mean of those that sent an entry, and no feedback."""
        if self.num_parts == 1:
            return super().outer_chains()
        turns = replace(
            self,
            parts=1,
            codec=f"{Turns(parts=self.num_parts)} | {self.codec}",
            mean_codec=self.mean_codec or self.codec,
            feedback=False,
            over="senders",
        )
        return turns.outer_chains()

    @override
    def polar_chain(self) -> Chain:
        """momentum → polar → scale, with row_normalize before the scale where rows are normalized."""
        if self.normalize_rows:
            return normalized_chain(self, row_beta2=self.row_beta2)
        return super().polar_chain()


@recipe(
    OneBitMuonSettings,
    summary="inner: momentum → polar → scale; every 11 steps: exchange(1-bit, feedback) of the weight change → Nesterov; from "
    "eight replicas on every 3 steps exchange(a quarter of the signs in turns), lengthened",
    source="muonwire, docs/one_bit_muon.md; after MuLoCo, arXiv 2505.23725, and 1-bit SGD (2014)",
)
def one_bit_muon(model: nn.Module, options: OneBitMuonSettings) -> ChainOptimizer:
    """Local Muon whose weight changes travel as the sign of every entry: about 1/H bit per parameter and step.

    The learning rate is that of dense Muon or up to twice it.
    """
    return with_muon_inside(model, options)
