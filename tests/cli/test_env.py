"""`muonwire env`."""

import json
import socket

import pytest
import torch

from muonwire import __version__
from muonwire.cli import env
from muonwire.cli.main import main
from muonwire.polar import set_processor


def run(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["env", *args])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_screen_fits_and_tells_what_a_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shown = run(capsys)
    assert max(map(len, shown.splitlines())) <= 80
    assert len(shown.splitlines()) <= 45
    for part in (
        __version__,
        torch.__version__,
        "gloo",
        "GF/s",
        "OMP_NUM_THREADS",
        "tyro",
        "torchft",
        "would be used",
    ):
        assert part in shown
    for _, name in socket.if_nameindex():
        assert name in shown


def test_the_class_and_dtype_are_those_that_optimizers_take(capsys):
    set_processor("avx2")
    try:
        printed = json.loads(run(capsys, "--json"))["processor"]
    finally:
        set_processor(None)
    assert printed["class"] == "avx2 (AVX2)"
    assert printed["polar factors"].startswith("in float32")


def test_the_interface_that_routes_to_the_master_is_named(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "127.0.0.1): it routes to MASTER_ADDR" in env.used_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert env.used_interface() == "eth7, which GLOO_SOCKET_IFNAME names"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    assert env.used_interface().startswith("none: no.such.host.invalid cannot be reached")


def test_a_torch_that_is_built_for_gpus_on_a_machine_without_one(capsys, monkeypatch):
    # What such a build answers: the accelerator that it is made for, unless asked for one that is there.
    def built_for(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    processor = json.loads(run(capsys, "--json"))["processor"]
    assert processor["accelerators"] == "none"
    assert processor["class"]
