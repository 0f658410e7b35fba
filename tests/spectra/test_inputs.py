"""Where in a weight's spectrum its inputs lie."""

import pytest
import torch
from torch import nn

from muonwire.errors import UsageError
from muonwire.spectra.inputs import input_energy
from muonwire.spectra.weights import weights_of
from tests.spectra.conftest import build_small


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shares_are_those_of_the_outputs(kind: str) -> None:
    """Without the smallest tenth of its singular values a layer's outputs lose the share that is reported."""
    model = build_small(kind)
    windows = torch.arange(2 * 16).view(2, 16) * 7 % 256
    found = {e.name: e for e in input_energy(model, windows)}
    hidden = [w for w in weights_of(model) if w.route.role == "hidden"]
    assert set(found) == {w.name for w in hidden}
    name = next(n for n in found if "down_proj" in n or "mlp.c_proj" in n)
    layer = model.get_submodule(name.removesuffix(".weight"))
    kept: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for ids in windows:
            model(input_ids=ids[None])
    hook.remove()
    x, w = torch.cat(kept), layer.weight.detach().double()
    w = w if isinstance(layer, nn.Linear) else w.mT
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    k = len(s) // 10
    small = u[:, -k:] @ torch.diag(s[-k:]) @ vt[-k:]
    lost = float((x @ small.mT).square().sum() / (x @ w.mT).square().sum())
    assert found[name].output == pytest.approx(lost, rel=1e-4)
    assert found[name].weight == pytest.approx(float(small.square().sum() / w.square().sum()), rel=1e-6)
    assert all(0 < e.largest < 1 and 0 < e.smallest < 1 for e in found.values())


def test_inputs_along_one_direction_are_found() -> None:
    """Inputs along the last singular vector have all their energy in the smallest tenth."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(20, 20, bias=False)
            self.proj.weight.data = torch.diag(torch.arange(20, 0, -1).float())

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.proj(nn.functional.one_hot(input_ids, 20).float())

    (only,) = input_energy(Toy(), torch.full((1, 4), 19))
    assert (only.largest, only.smallest, only.output) == (0.0, 1.0, 1.0)
    with pytest.raises(UsageError, match="no hidden weight of this model"):
        input_energy(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), torch.zeros(1, 2, dtype=torch.int64)
        )
