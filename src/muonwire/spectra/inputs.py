"""How the inputs of a weight are distributed over its singular directions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.spectra.edit import decompose
from muonwire.spectra.weights import Weight, weights_of


@dataclass(frozen=True, kw_only=True)
class InputEnergy:
    """Shares that belong to one end of the spectrum of one weight W = U diag(σ) Vᵀ, for inputs x of real text.

    Args:
        name, kind: of the weight.
        largest, smallest: share of Σᵢ E(vᵢᵀx)² in the directions vᵢ of the largest (smallest) tenth of the σᵢ; 0.1 where
            the inputs are independent of the weight's spectrum.
        output: share of E‖Wx‖² = Σᵢ σᵢ² E(vᵢᵀx)² in the smallest tenth.
        weight: share of ‖W‖²_F in the smallest tenth.
    """

    name: str
    kind: str
    largest: float
    smallest: float
    output: float
    weight: float


@torch.no_grad()
def input_energy(
    model: nn.Module, windows: Tensor, *, step: Callable[[str], None] | None = None
) -> list[InputEnergy]:
    """The shares of every hidden weight that belongs to a linear layer.

    Args:
        model: a causal LM.
        windows: (number, length) token ids.
        step: called with the name of each weight, for a progress bar.

    Raises:
        UsageError: no hidden weight belongs to a linear layer.
    """
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    found = []
    hidden = [w for w in weights_of(model) if w.route.role == "hidden"]
    # One kind at a time, to keep fewer inputs in memory.
    for kind in dict.fromkeys(w.kind for w in hidden):
        linear = {w.name: (w, owners[id(w.route.param)]) for w in hidden if w.kind == kind}
        linear = {n: (w, m) for n, (w, m) in linear.items() if _is_linear(m)}
        if not linear:
            continue
        inputs = _inputs(model, {n: m for n, (_, m) in linear.items()}, windows)
        for name, (weight, module) in linear.items():
            if step is not None:
                step(name)
            found.append(_shares(weight, module, inputs[name]))
    if not found:
        raise UsageError("spectra: no hidden weight of this model belongs to a linear layer")
    return found


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _inputs(model: nn.Module, modules: dict[str, nn.Module], windows: Tensor) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept[name].append(args[0].detach().flatten(0, -2).float())

        return hook

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    try:
        for ids in windows:
            model(input_ids=ids[None].to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _shares(weight: Weight, module: nn.Module, x: Tensor) -> InputEnergy:
    assert isinstance(module.weight, Tensor)
    # The other class is transformers' Conv1D, whose weight is (in, out).
    matrix = module.weight if isinstance(module, nn.Linear) else module.weight.mT
    factors = decompose(weight.name, matrix)
    along = (x.to(factors.vt) @ factors.vt.mT).square().mean(0)
    energy = factors.s.square()
    tenth = max(len(energy) // 10, 1)
    passed = along * energy
    return InputEnergy(
        name=weight.name,
        kind=weight.kind,
        largest=float(along[:tenth].sum() / along.sum()),
        smallest=float(along[-tenth:].sum() / along.sum()),
        output=float(passed[-tenth:].sum() / passed.sum()),
        weight=float(energy[-tenth:].sum() / energy.sum()),
    )
