"""The command line: help, and one clear error with exit code 2 for each kind of bad input."""

import re
import socket
import subprocess
import sys

import pytest

from muonwire.cli import main as cli


def call(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def plain(text):
    """Without the frames and line breaks of the terminal."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


@pytest.mark.parametrize("args", [["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, args):
    code, out, _ = call(capsys, *args)
    assert code == 0
    for name in cli.COMMANDS:
        assert name in out


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help_with_examples(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert "examples:" in out
    assert f"muonwire {command}" in out


def test_recipes_are_listed_with_their_options(capsys):
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    assert "local_muon: inner:" in out
    assert "interval=5" in out


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short a text")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "'nonsense' is not a command; allowed are train, compare"),
        (["train", "--recipe", "lion"], "recipe: 'lion' is unknown; allowed are adamw"),
        (["train", "--recipe", "muon(beta=1)"], "'beta' is not an option; allowed are"),
        (["train", "--recipe", "local_muon(interval=0)"], "interval (H) is 0; it must be a whole number"),
        (["train", "--recipe", "local_muon(density=0)"], "density is 0; it must lie in (0, 1]"),
        (["train", "--recipe", "local_muon(density=1.5)"], "density is 1.5; it must lie in (0, 1]"),
        (["train", "--text", "missing.txt"], "missing.txt cannot be read"),
        (["train", "--text", "empty.txt"], "empty.txt is empty"),
        (["train", "--text", "short.txt"], "give a text of at least"),
        (["train", "--text", "short.txt", "--replicas", "2"], "give a text of at least"),
        (["train", "--replicas", "0"], "replicas: 0; at least 1 is needed"),
        (["train", "--replicas", "2", "--port", "70000"], "port: 70000 is not one"),
        (["train", "--timeout-s", "0"], "timeout_s is 0.0; it is at least 1 second"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--no-such-option"], "--no-such-option"),
        (["train", "--task"], "--task"),
        (["train", "--task", "sound"], "task: 'sound' is unknown; allowed are text, vision"),
        (["train", "--task", "vision", "--sequence", "8"], "--sequence"),
        (["train", "--task", "vision", "--model", "vgg"], "vision model: 'vgg' is unknown; allowed are vit"),
        (["train", "--task", "vision", "--data", "missing"], "holds no file train-images"),
        (
            ["compare", "--task", "vision", "--sequence", "8"],
            "sequence belong to --task text, but the task is vision",
        ),
        (
            ["compare", "--images", "digits"],
            "images belong to --task vision, but the task is text; leave them out",
        ),
        (["compare", "--task", "sound"], "task: 'sound' is unknown"),
        (["compare", "--recipes", "muon", "lion"], "recipe: 'lion' is unknown"),
        (["bench", "sound"], "bench: 'sound' is not an action; allowed are polar, processor, codec"),
        (["bench", "codec", "--shapes", "8x0"], "shape is '8x0'; it takes ROWSxCOLUMNS"),
        (["bench", "codec", "--codecs", "gzip"], "'gzip' is not a part; allowed are rows"),
        (
            ["bench", "codec", "--captured", "missing.safetensors"],
            "make one with benchmarks/capture_updates.py",
        ),
        (["bench", "codec", "--chart", "chart.gif"], "it takes a .png, .html or .svg file"),
        (["bench", "codec", "--rounds", "0"], "rounds is 0; at least one is needed"),
        (["compare", "--recipes", "muon", "muon"], "each once"),
        (["compare", "--recipes", "local_muon(density=2)"], "density is 2; it must lie in (0, 1]"),
        (["compare", "--link", "fast"], "link: 'fast' does not parse"),
        (["compare", "--preset", "huge"], "preset"),
        (["compare", "--text", "missing.txt"], "missing.txt cannot be read"),
        (["compare", "--text", "empty.txt"], "empty.txt is empty"),
        (["compare", "--text", "short.txt"], "give a text of at least"),
        (["compare", "--replicas", "0"], "replicas is 0"),
        (["compare", "--lr-grid", "0"], "lr is 0"),
        (["compare", "--steps", "0"], "at least 1"),
        (["compare", "--model-size", "huge"], "allowed are pico"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_error_and_exit_code_2(capsys, monkeypatch, texts, args, says):
    monkeypatch.chdir(texts)
    code, _, err = call(capsys, *args)
    assert code == 2
    assert says in plain(err)
    assert "Traceback" not in err


def test_a_port_in_use_is_refused_before_anything_starts(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = call(capsys, "train", "--replicas", 2, "--port", port)
        assert code == 2
        assert f"port: {port} cannot be used" in err
        code, _, err = call(capsys, "compare", "--replicas", 2, "--port", port)
        assert code == 2


def test_a_folder_with_a_run_in_it_is_not_overwritten(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = ["train", "--steps", 1, "--sequence", 8, "--batch", 1, "--evaluation-sequences", 2, "--out", "run"]
    assert call(capsys, *args)[0] == 0
    code, _, err = call(capsys, *args)
    assert code == 2
    assert "holds a run already; continue it with --resume" in err
    assert call(capsys, *args, "--resume")[0] == 0


def test_a_closed_pipe_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "muonwire", "recipes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    printed = process.stderr.read()
    assert process.wait() == 141
    assert "Traceback" not in printed
    assert "BrokenPipe" not in printed


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_a_missing_package_is_one_line_that_names_the_extra(capsys, monkeypatch, command):
    def without(name):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(cli.importlib, "import_module", without)
    code, _, err = call(capsys, command)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert f"{command} needs tyro" in err
    assert re.search(r'pip install "muonwire\[(train|train,report|lab)\]"$', err.strip())


def test_a_module_of_our_own_that_is_missing_is_no_matter_of_extras(monkeypatch):
    def without(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cli.importlib, "import_module", without)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])
