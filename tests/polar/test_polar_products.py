"""Products counted: what gates speed here, where wall-clock would not repeat."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from muonwire.polar import count_products, explain, polar, processor, schedules
from muonwire.polar.gram import gram_iteration, symmetric_flops, symmetric_gram, uses_blocks
from muonwire.polar.products import gram_flops, plain_flops
from tests.polar.polar_inputs import SPECTRA, gaussian, spectrum

SHAPES = [(64, 64), (64, 256), (256, 64), (48, 100)]
# FLOPs of torch.optim.Muon over ours on Gaussian input; wall-clock follows where products dominate.
SAVINGS = {
    (512, 2048): 4.5,
    (576, 1536): 4.5,
    (768, 3072): 4.5,
    (1024, 4096): 4.5,
    (512, 512): 1.6,
    (1024, 1024): 1.6,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(schedules.SCHEDULES))
def test_plain_count_is_exact(shape, name):
    schedule = schedules.SCHEDULES[name]
    with count_products() as count:
        polar(gaussian(*shape), method="newton_schulz", schedule=name)
    assert count.flops == plain_flops(schedule, *shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("restarts", [(), (2,), (1, 2, 3, 4)])
@pytest.mark.parametrize("degree", [3, 5, 7])
def test_gram_count_is_exact(shape, restarts, degree):
    schedule = schedules.polar_express(lower=0.1, steps=5, degree=degree)
    with count_products() as count:
        gram_iteration(gaussian(*shape) / 30, schedule=schedule, restarts=restarts)
    assert count.flops == gram_flops(schedule, *shape, restarts=restarts)


def test_blocks_are_counted_and_right():
    y = gaussian(520, 1040)
    assert uses_blocks(520, 1040, dtype=torch.bfloat16, device=y.device)
    for x in (y, y.mT):
        with count_products() as count:
            gram = symmetric_gram(x, out=torch.empty(520, 520))
        assert count.flops == symmetric_flops(520, 1040, blocks=True)
        # Off the diagonal blocks one half is a copy of the other; within them the product's own rounding is left.
        assert torch.equal(gram[:130, 130:], gram[130:, :130].mT)
        torch.testing.assert_close(gram, gram.mT, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(gram, y @ y.mT, rtol=1e-4, atol=1e-3)
    schedule = schedules.polar_express(lower=0.1, steps=2)
    with count_products() as count:
        gram_iteration(y.bfloat16() / 60, schedule=schedule, restarts=(1,))
    assert count.flops == gram_flops(schedule, 520, 1040, restarts=(1,), blocks=True)


def test_count_of_torch_is_the_formula():
    for shape in SHAPES:
        with count_products() as count:
            _zeropower_via_newtonschulz(gaussian(*shape), (3.4445, -4.775, 2.0315), 5, 1e-7)
        assert count.flops == plain_flops(schedules.JORDAN, *shape)


@pytest.mark.parametrize("name", list(SPECTRA))
def test_auto_takes_what_its_report_says_and_no_more_than_torch(name, monkeypatch):
    monkeypatch.setattr(processor, "_override", [processor.AMX])
    x = spectrum(name)
    report = explain(x, dtype=torch.bfloat16).report
    with count_products() as count:
        polar(x, dtype=torch.bfloat16)
    assert count.matrix_flops == report.flops
    assert report.flops <= plain_flops(schedules.JORDAN, *x.shape)
    # The estimate of the spectrum costs less than one product of r×r.
    assert count.flops - count.matrix_flops < 2 * min(x.shape) ** 3


@pytest.mark.parametrize("shape", list(SAVINGS))
def test_savings_on_gaussian_input(shape):
    # In the dtype that is used here: another one may take minutes on a processor that lacks it.
    x = gaussian(*shape)
    with count_products() as count:
        polar(x)
    assert plain_flops(schedules.JORDAN, *shape) / count.flops >= SAVINGS[shape]


def test_products_of_a_batch_and_of_vectors():
    with count_products() as count:
        torch.ones(3, 2, 4) @ torch.ones(3, 4, 5)
        torch.mv(torch.ones(6, 7), torch.ones(7))
        torch.ones(4, 6) @ torch.ones(6, 6)
    assert [p.flops for p in count.products] == [240, 84, 288]
    assert (count.flops, count.matrix_flops, len(count)) == (612, 240, 1)
