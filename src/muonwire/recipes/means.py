"""Who averages what an exchange sends: every replica, or the owner of each part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from muonwire.codec import Codec, parse
from muonwire.recipes.base import RecipeSettings
from muonwire.stages import Exchange, Feedback, NoFeedback


@dataclass(frozen=True, kw_only=True)
class MeansSettings(RecipeSettings):
    """How an exchange makes means.

    Args:
        means: "gather": all send all to all; "lossless" and "recompressed": each part of the model has an owner, which averages it
            for all and sends the mean on, without loss (with "sign(scale=shared)" for every codec) or through ``mean_codec``, at a
            cost that hardly grows with the replicas; "auto": what sends least at their number. Default: "gather".
        mean_codec: of owners' means with "recompressed", in textual form. Default: none; the codec of what they average.
        mean_prediction: how much of the last mean owners expect the next one to be, and do not send, with "recompressed"; in
            [0, 1], for codecs that send every entry. Default: 0.
    """

    means: Literal["gather", "lossless", "recompressed", "auto"] = "gather"
    mean_codec: str | None = None
    mean_prediction: float = 0.0

    @override
    def idle(self) -> Mapping[str, str]:
        compressed = self.means in ("recompressed", "auto")
        names = () if compressed else ("mean_codec", "mean_prediction")
        return {**super().idle(), **dict.fromkeys(names, "with means=recompressed or auto")}

    def exchanged(
        self,
        codec: Codec,
        *,
        feedback: Feedback | None = None,
        over: str = "replicas",
        lengthen: bool = False,
    ) -> Exchange:
        """The exchange through ``codec``, with means of this kind."""
        compressed = self.means in ("recompressed", "auto")
        return Exchange(
            codec=codec,
            feedback=feedback or NoFeedback(),
            over=over,
            means=self.means,
            mean_codec=parse(str(self.mean_codec)) if compressed and self.mean_codec is not None else None,
            mean_prediction=self.mean_prediction if compressed else 0.0,
            lengthen=lengthen,
        )
