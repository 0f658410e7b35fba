"""The classes of processors: how they are recognized, and what follows from them."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from muonwire.errors import UsageError
from muonwire.polar import PROCESSORS, explain, find_processor, polar, polar_list, set_processor
from muonwire.polar.processor import _recognized, slowest
from tests.polar.polar_inputs import gaussian

CPU = torch.device("cpu")
ORDER = list(PROCESSORS)


@pytest.fixture(autouse=True)
def recognized():
    yield
    set_processor(None)
    _recognized.cache_clear()


def found(**variables):
    code = "import torch; from muonwire.polar import find_processor; print(find_processor(torch.device('cpu')).name)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or run.stderr.strip().splitlines()[-1]


def test_the_same_machine_always_decides_alike():
    assert found() == find_processor(CPU).name


@pytest.mark.parametrize(
    ("limit", "wanted"), [("AVX2", "avx2"), ("avx512_core", "avx512"), ("AVX512_CORE_BF16", "avx512_bf16")]
)
def test_a_limit_of_onednn_lowers_the_class(limit, wanted, monkeypatch):
    limited = slowest([wanted, find_processor(CPU).name])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    _recognized.cache_clear()
    assert find_processor(CPU) is limited


@pytest.mark.parametrize(("capability", "wanted"), [("avx2", "avx2"), ("default", "generic")])
def test_a_limit_of_torch_lowers_the_class(capability, wanted):
    """Which torch reads as it is loaded, so that it takes a process of its own."""
    assert found(ATEN_CPU_CAPABILITY=capability) == slowest([wanted, find_processor(CPU).name]).name


def test_overridden_by_variable_and_by_call(monkeypatch):
    recognized = find_processor(CPU)
    assert found(MUONWIRE_PROCESSOR="gpu_fp16") == "gpu_fp16"
    monkeypatch.setenv("MUONWIRE_PROCESSOR", "zen3")
    # What was recognized stays until it is asked anew.
    assert find_processor(CPU) is recognized
    _recognized.cache_clear()
    with pytest.raises(UsageError, match="processor: 'zen3' is no class; allowed are generic, avx2"):
        find_processor(CPU)
    set_processor("avx2")
    assert find_processor(CPU) is PROCESSORS["avx2"]
    set_processor(None)
    monkeypatch.delenv("MUONWIRE_PROCESSOR")
    assert find_processor(CPU) is recognized
    with pytest.raises(UsageError, match="allowed are generic, avx2"):
        set_processor("zen3")


def test_the_slowest_of_several_classes_decides():
    for a, b in itertools.product(ORDER, ORDER):
        assert slowest([a, b]).name == ORDER[min(ORDER.index(a), ORDER.index(b))]
    assert slowest(["amx", "avx2", "gpu_bf16"]).dtype == torch.float32


@pytest.mark.parametrize("shape", [(8, 8), (64, 176), (192, 192), (256, 1024), (512, 512), (4, 16, 16)])
@pytest.mark.parametrize("name", ["avx2", "avx512", "amx"])
def test_products_run_in_the_dtype_of_the_class_at_every_size(name, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    row = PROCESSORS[name]
    count = 1 if x.ndim == 2 else shape[0]
    dtype = row.dtype_of(shape[-2:], count=count)
    assert dtype == (torch.bfloat16 if name == "amx" and shape[-2] > 192 else torch.float32)
    set_processor(name)
    assert torch.equal(polar(x), polar(x, dtype=dtype))
    assert explain(x).dtype == (dtype if x.ndim == 2 else row.dtype_of(shape[-2:]))
    if x.ndim == 2:
        assert torch.equal(polar(x, processor=row), polar_list([x], processor=row)[0])
    # A result from products in bfloat16 holds numbers of eight bits.
    assert torch.equal(polar(x), polar(x).bfloat16().float()) == (dtype == torch.bfloat16)


def test_a_list_is_stacked_as_the_class_has_it():
    xs = [gaussian(96, 96, seed) for seed in range(3)]
    for row in (PROCESSORS["avx2"], PROCESSORS["amx"]):
        assert row.stacks((96, 96))
        whole = polar(torch.stack(xs), processor=row)
        for q, wanted in zip(polar_list(xs, processor=row), whole, strict=True):
            assert torch.equal(q, wanted)
    large = [gaussian(256, 1024, seed) for seed in range(2)]
    assert not PROCESSORS["avx2"].stacks((256, 1024))
    for q, x in zip(polar_list(large, processor=PROCESSORS["avx2"]), large, strict=True):
        assert torch.equal(q, polar(x, processor=PROCESSORS["avx2"]))
