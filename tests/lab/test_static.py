"""What the static claims share: measures with known values, the dealing of real matrices, and what is asked of the machine."""

import importlib.util
import math

import pytest
import torch

from muonwire.errors import UsageError
from muonwire.lab.claims.conflict import dct_energy
from muonwire.lab.claims.integration import precision_by_device
from muonwire.lab.engine.claim import Setting
from muonwire.lab.inputs import samples
from muonwire.lab.inputs.captured import key, write
from muonwire.lab.inputs.text_training import TEXT_TRAINING
from muonwire.lab.measures.matrices import condition, departure


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (9, 9)])
def test_a_multiple_of_a_semi_orthogonal_matrix_has_no_departure(shape):
    q = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()).Q
    assert departure(3.0 * q[: shape[0], : shape[1]]) < 1e-7


def test_rank_one_and_zero_are_farthest_from_orthogonal():
    assert departure(torch.outer(torch.arange(1.0, 5.0), torch.ones(7))) == pytest.approx(
        math.sqrt(1 - 1 / 4)
    )
    assert departure(torch.zeros(4, 7)) == 1.0


def test_departure_is_the_orthogonality_error_at_the_best_scale():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).double()
    gram = x @ x.mT
    scales = torch.linspace(0.001, 0.5, 20_000, dtype=torch.float64)[:, None, None]
    errors = (scales * gram - torch.eye(6)).flatten(1).norm(dim=1) / math.sqrt(6)
    assert departure(x) == pytest.approx(float(errors.min()), rel=1e-4)


def test_condition_ends_where_float32_does():
    assert condition(torch.tensor([8.0, 2.0])) == 4.0
    assert condition(torch.tensor([8.0, 0.0])) == pytest.approx(1 / torch.finfo(torch.float32).eps)


def test_the_seeds_deal_every_real_matrix_once_and_no_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "REAL", {TEXT_TRAINING: "training"})
    folder = TEXT_TRAINING.folder(tmp_path, quick=False)
    folder.mkdir(parents=True)
    made = {key("step 1", "momentum", f"layer {i:02}"): torch.full((2, 3), float(i)) for i in range(12)}
    write(folder, made, {})
    dealt = []
    for seed in range(samples.NUM_PARTS):
        setting = Setting(seed=seed, quick=False, folder=tmp_path, inputs=(TEXT_TRAINING,))
        found = list(samples.real_samples(setting))
        assert {what for what, _ in found} == {"training momentum"}
        dealt += [float(x[0, 0]) for _, x in found]
    assert sorted(dealt) == [float(i) for i in range(1, 12)]


def test_without_a_photograph_the_error_says_what_to_install(monkeypatch):
    assert dct_energy.photograph().ndim == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        dct_energy.photograph()


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("cuda", (6, 1), "float32"),
        ("cuda", (7, 0), "float16"),
        ("cuda", (7, 5), "float16"),
        ("cuda", (8, 0), "bfloat16"),
        ("cuda", (9, 0), "bfloat16"),
    ],
)
def test_the_rule_of_the_source(monkeypatch, device, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_by_device.rule(torch.device(device)) == dtype
