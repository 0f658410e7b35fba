"""Lightning's mixed precision, with gradients that can be clipped where the optimizer takes the scaler's attributes."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from typing_extensions import override


class Clipping(MixedPrecision):
    """Mixed precision that clips gradients, after it has taken off a scaler's scale; the optimizer then gets what the scaler found.

    Lightning refuses to clip where an optimizer takes the scaler's attributes, and leaves the scale to it.
    """

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        result = closure()
        if result is None and model.automatic_optimization:
            # training_step has left this batch out; the others take their step.
            return optimizer.step(**kwargs)
        self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return output

    @override
    def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        Precision.clip_gradients(self, optimizer, *args, **kwargs)
