"""Builds the package and tries it as somebody who installs it would, in environments of their own outside this tree.

python .ci/release.py build        dist/: wheel and source archive, what they hold and what they weigh
python .ci/release.py check        the core alone, then each extra alone: installed from the wheel and used once, with the
                                   pinned versions (constraints.txt) and with the oldest that pyproject.toml allows
python .ci/release.py check --versions oldest --tests
                                   the core's tests too, on the installed package

Environments are kept in $MUONWIRE_CACHE (default: ~/.cache/muonwire-release) under a hash of what is installed in them, so that a
second run only replaces the wheel. Any Python that pyproject.toml allows can run this file; it is the one that is tested.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("MUONWIRE_CACHE") or Path.home() / ".cache" / "muonwire-release")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
# The tools of this repository; `make check` and `make test` install and use them.
NOT_TRIED = {"dev"}
VERSIONS = ("pinned", "oldest")
ELASTIC_TESTS = ("optim/test_elastic", "transport/test_elastic", "transport/test_elastic_parts")
CORE_TESTS = [
    *(f"tests/{room}" for room in ("codec", "optim", "polar", "recipes", "stages", "transport")),
    # Without those that need torchft.
    *(f"--ignore=tests/{name}.py" for name in ELASTIC_TESTS),
]
TEST_TOOLS = ("accelerate", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist")
# A wheel that grows past this holds something that it should not.
LARGEST_WHEEL_BYTES = 1_200_000
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}

# What each extra is for, with no other installed. FOLDER is the one that the commands run in.
PICO = "--model-size pico --batch 2 --evaluation-sequences 4 --steps 4"
TRIES = {
    "train": [
        f"muonwire train --recipe one_bit_muon(interval=2) --replicas 2 {PICO} --out run",
        "muonwire recipes",
        "muonwire env",
    ],
    "report": [f"python {HERE / 'release_page.py'} page.html page.png"],
    "lab": [
        # The claim reads a photograph that this package carries.
        "python -m pip install --quiet scikit-learn",
        "muonwire lab run conflict.2 --quick --out lab",
        f"muonwire train --recipe muon {PICO} --out run",
        "muonwire spectra show run --out spectra",
    ],
    "all": [
        "muonwire compare --recipes muon --model-size pico --batch 2 --replicas 2 --lr-grid 0.01 --seeds 0 --steps 4 --out compare",
        "muonwire plan --up 10mbit --down 10mbit --replicas 4 --parameters 1e6 --step-s 0.5",
        "muonwire bench codec --help",
    ],
    "elastic": [f"python {HERE / 'release_elastic.py'}"],
    "integrations": [
        f"python -m torch.distributed.run --nproc-per-node 2 {ROOT / 'examples' / 'trainer.py'} trainer",
        f"python -m torch.distributed.run --nproc-per-node 2 {ROOT / 'examples' / 'accelerate_loop.py'} accelerate",
    ],
    "docs": [f"mkdocs build --quiet --strict --config-file {ROOT / 'mkdocs.yml'} --site-dir FOLDER/site"],
}
# Of each command: what says in one line, where no extra is installed, which to install.
WITHOUT_EXTRAS = {
    "train": "train",
    "compare": "train,report",
    "plan": "train,report",
    "lab list": "lab",
    "spectra show run": "lab",
    "bench codec": "train,report",
    "env": "train",
    "recipes": "train",
}


def run(*command: object, cwd: Path, env: dict[str, str] | None = None, timeout: int = 1800) -> str:
    """What the command prints on standard output; where it fails, all that it printed and the end of this script."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(holds: bool, what: str) -> None:
    """End the script where something does not hold."""
    if not holds:
        sys.exit(f"release check failed: {what}")


def say(text: str) -> None:
    """A line at once, so that a log shows how far the check is."""
    print(text, flush=True)


class Environment:
    """A virtual environment in the cache.

    Args:
        name: of what it is for.
        requirements: what pip installs.
        constraints: exact versions, a line each.
        below: an environment whose packages this one sees too, so that torch is installed once for all extras.
    """

    def __init__(
        self,
        name: str,
        requirements: list[str],
        constraints: list[str],
        *,
        below: "Environment | None" = None,
    ) -> None:
        self.requirements, self.constraints, self.below = requirements, constraints, below
        what = [sys.version, sys.prefix, requirements, constraints, below.folder.name if below else ""]
        self.folder = CACHE / f"{name}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"
        self.python = self.folder / "bin" / "python"

    @cached_property
    def packages(self) -> Path:
        """The folder of its packages."""
        return Path(
            run(
                self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=CACHE
            ).strip()
        )

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of a process in it: no other package is visible, and its scripts are found first."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        return {**kept, "PATH": f"{self.folder / 'bin'}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}

    def pip(self, *arguments: object) -> str:
        """Run its pip."""
        return run(
            self.python, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=CACHE, env=self.variables
        )

    def make(self) -> "Environment":
        """Install it, unless the cache has it whole."""
        done = self.folder / ".complete"
        if not done.exists():
            begun = time.perf_counter()
            shutil.rmtree(self.folder, ignore_errors=True)
            # Without a pip and a setuptools of its own, which would hide those below.
            run(
                sys.executable,
                "-m",
                "venv",
                *(["--without-pip"] if self.below else []),
                self.folder,
                cwd=CACHE,
            )
            if self.below:
                (self.packages / "below.pth").write_text(f"{self.below.packages}\n")
            pins = self.folder / "constraints.txt"
            pins.write_text("".join(f"{line}\n" for line in self.constraints))
            if self.requirements:
                self.pip("install", "--quiet", "--constraint", pins, *self.requirements)
            done.touch()
            say(f"  installed {self.folder.name} in {time.perf_counter() - begun:.0f} s")
        return self

    def install(self, wheel: Path) -> None:
        """Put the wheel of now into it; what it needs is there."""
        self.pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)
        self.pip("check")

    def version(self, package: str) -> str:
        """The installed version of a package."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return run(self.python, "-c", code, cwd=CACHE, env=self.variables).strip()


def pinned() -> list[str]:
    """The exact versions of constraints.txt."""
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def oldest(requirements: list[str]) -> list[str]:
    """The lower bound of each package as its exact version, and nothing on what those need themselves."""
    bounds: dict[str, str] = {}
    for text in requirements:
        if found := re.match(r"([\w.-]+)>=([\w.]+)", text):
            # An extra may need a later one than the core.
            bounds[found[1]] = max(bounds.get(found[1], "0"), found[2], key=_numbers)
    return sorted(f"{name}=={version}" for name, version in bounds.items())


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def build() -> Path:
    """Make wheel and source archive, check what they hold, and return the wheel."""
    CACHE.mkdir(parents=True, exist_ok=True)
    tools = Environment("tools", ["build", "twine"], []).make()
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        # setuptools would take stale files of an earlier build from build/.
        _copy_tree(Path(folder))
        run(tools.python, "-m", "build", "--outdir", dist, folder, cwd=CACHE, env=tools.variables)
    (wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    run(tools.python, "-m", "twine", "check", "--strict", wheel, archive, cwd=CACHE)
    _check_wheel(wheel)
    _check_archive(archive)
    return wheel


def _copy_tree(folder: Path, *, without: str = "") -> None:
    """Copy what git knows or would add, but for one folder of it."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and Path(name).parts[0] != without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def _check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as contents:
        held = {info.filename: info.file_size for info in contents.infolist()}
    source = ROOT / "src"
    code = {p.relative_to(source).as_posix() for p in source.rglob("*.py")}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    data = {p.relative_to(source).as_posix() for pattern in patterns for p in source.rglob(pattern)}
    metadata = {f"{wheel.name.rsplit('-', 3)[0]}.dist-info/{name}" for name in METADATA}
    check(bool(code and data), "the source has no files")
    check(
        set(held) == code | data | metadata,
        f"the wheel's files differ in {sorted(set(held) ^ (code | data | metadata))}",
    )
    weight = wheel.stat().st_size
    check(weight <= LARGEST_WHEEL_BYTES, f"the wheel has {weight:,} bytes, more than {LARGEST_WHEEL_BYTES:,}")
    say(
        f"{wheel.name}: {weight:,} bytes; {len(code)} modules, {len(data)} data files, {sum(held.values()):,} bytes unpacked"
    )


def _check_archive(archive: Path) -> None:
    with tarfile.open(archive) as contents:
        names = [Path(*Path(name).parts[1:]) for name in contents.getnames()]
    top = {name.parts[0] for name in names if name.parts}
    allowed = {
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
        "src",
    }
    check(top == allowed, f"the source archive's top differs in {sorted(top ^ allowed)}")
    say(f"{archive.name}: {archive.stat().st_size:,} bytes")


def check_release(wheel: Path, versions: str, *, tests: bool) -> None:
    """Install the core alone and each extra alone, and use each."""
    base = Environment(f"{versions}-base", CORE, _constraints(versions, [])).make()
    core = Environment(f"{versions}-core", [], [], below=base).make()
    core.install(wheel)
    names = ("torch", "numpy", "constriction")
    say(
        f"{versions}: Python {sys.version.split()[0]}, "
        + ", ".join(f"{name} {base.version(name)}" for name in names)
    )
    with tempfile.TemporaryDirectory() as folder:
        _try_core(core, Path(folder))
    for extra in sorted(set(EXTRAS) - NOT_TRIED):
        check(
            extra in TRIES,
            f"the extra {extra} is not used anywhere in {Path(__file__).name}: add it to TRIES",
        )
        # The wheel itself is replaced at every run: what is installed with it follows from its requirements alone.
        needed = _requirements(extra)
        there = Environment(f"{versions}-{extra}", needed, _constraints(versions, needed), below=base).make()
        there.install(wheel)
        with tempfile.TemporaryDirectory() as folder:
            for line in TRIES[extra]:
                begun = time.perf_counter()
                run(*line.replace("FOLDER", folder).split(), cwd=Path(folder), env=there.variables)
                say(f"  [{extra}] {line.replace(f'{ROOT}/', '')}: {time.perf_counter() - begun:.0f} s")
    if tests:
        _run_tests(wheel, base, versions)


def _constraints(versions: str, requirements: list[str]) -> list[str]:
    return pinned() if versions == "pinned" else oldest([*CORE, *requirements])


def _requirements(extra: str) -> list[str]:
    """What an extra installs, with the extras that it names itself."""
    found = []
    for text in EXTRAS[extra]:
        named = re.fullmatch(rf"{PROJECT['project']['name']}\[([\w,]+)\]", text)
        found += [r for name in named[1].split(",") for r in _requirements(name)] if named else [text]
    return found


def _try_core(core: Environment, folder: Path) -> None:
    say(f"  {run(core.python, HERE / 'release_core.py', 'import', cwd=folder, env=core.variables).strip()}")
    printed = run(core.python, HERE / "release_core.py", "snippet", cwd=folder, env=core.variables)
    say(
        "  the README's first snippet, two replicas: "
        + "; ".join(line for line in printed.splitlines() if line.startswith("replica"))
    )
    for command, extras in WITHOUT_EXTRAS.items():
        done = subprocess.run(
            ["muonwire", *command.split()], cwd=folder, env=core.variables, capture_output=True, text=True
        )
        expected = f'pip install "muonwire[{extras}]"'
        good = done.returncode == 1 and len(done.stderr.splitlines()) == 1 and expected in done.stderr
        check(
            good, f"muonwire {command} without extras says, instead of {expected}: {done.stdout}{done.stderr}"
        )
    say(
        f"  {len(WITHOUT_EXTRAS)} commands without their extras: one line each; the last, {done.stderr.strip()}"
    )


def _run_tests(wheel: Path, base: Environment, versions: str) -> None:
    needed = [*_requirements("all"), *(line for line in pinned() if line.split("==")[0] in TEST_TOOLS)]
    there = Environment(f"{versions}-tests", needed, _constraints(versions, needed), below=base).make()
    there.install(wheel)
    with tempfile.TemporaryDirectory() as folder:
        # Without the source, so that it is the installed package that is tested.
        _copy_tree(Path(folder), without="src")
        pytest = ["-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
        done = run(there.python, *pytest, *CORE_TESTS, cwd=Path(folder), env=there.variables, timeout=3600)
    counts = [line for line in done.splitlines() if re.search(r"\d passed", line)]
    check(bool(counts), f"the tests of the core say nothing of how many passed: {done[-500:]}")
    say(f"  tests of the core: {counts[-1]}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("build", help="make dist/ and check what it holds")
    checked = actions.add_parser("check", help="build, then install and use the core and each extra")
    checked.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    checked.add_argument("--tests", action="store_true", help="run the core's tests in each environment too")
    arguments = parser.parse_args()
    wheel = build()
    if arguments.action == "check":
        for versions in arguments.versions:
            check_release(wheel, versions, tests=arguments.tests)
        say("release check passed")


if __name__ == "__main__":
    main()
