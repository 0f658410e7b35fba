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
    """

    means: Literal["gather", "lossless", "recompressed", "auto"] = "gather"
    mean_codec: str | None = None

    @override
    def idle(self) -> Mapping[str, str]:
        compressed = self.means in ("recompressed", "auto")
        return {**super().idle(), **({} if compressed else {"mean_codec": "with means=recompressed or auto"})}

    def exchanged(
        self, codec: Codec, *, feedback: Feedback | None = None, over: str = "replicas"
    ) -> Exchange:
        """The exchange through ``codec``, with means of this kind."""
        recompresses = self.means in ("recompressed", "auto") and self.mean_codec is not None
        return Exchange(
            codec=codec,
            feedback=feedback or NoFeedback(),
            over=over,
            means=self.means,
            mean_codec=parse(str(self.mean_codec)) if recompresses else None,
        )
