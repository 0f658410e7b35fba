"""`muonwire` commands as processes of their own, forked from a server that has imported everything.

A fresh interpreter takes seconds of a core to import torch, and the server of its replicas takes them again. What a
command does from its first line on is the same here: arguments, environment, signals, output and exit code. That an
interpreter finds it is tested where torchrun, a host or a script starts one.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing.forkserver import ensure_running
from pathlib import Path

from muonwire.compare.hosts import Host

PRELOADED = (
    "torch",
    "torch.distributed",
    # What torch imports when the first optimizer is made, and when a launcher starts.
    "torch._dynamo",
    "torch.distributed.launcher.api",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.llama.modeling_llama",
    "pytest",
    "muonwire.cli.main",
    "muonwire.recipes",
    "muonwire.train.loop",
    "tests.models",
    "tests.optim.sharded_nets",
    "tests.replicas",
    "tests.tiny_task",
)

_Popen = subprocess.Popen

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(PRELOADED))


def start_server():
    """Have it import while tests begin; otherwise it does when the first process is wanted."""
    ensure_running()


def _enter(words, cwd, environment, host, output, errors):
    os.setsid()
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if host is not None:
        host.enter()
    import torch

    from muonwire.cli.main import main
    from muonwire.train import launch

    # The replicas of a launcher fork from it: it has what a server of its own would have to import. Threads of arithmetic do not
    # survive that.
    torch.set_num_threads(1)
    launch.start_method = lambda modules=(): "fork"
    what, *rest = words
    if what == "-m":
        assert rest[0] == "muonwire"
        main(rest[1:])
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(what, run_name="__main__")


class Command:
    """A running command, with what subprocess.Popen has.

    Args:
        words: after ``muonwire``.
        python: whether they are those after ``python`` instead: a script, ``-c`` or ``-m muonwire``. Default: no.
        cwd: folder. Default: this one.
        env: environment. Default: this process's.
        host: of muonwire.compare.hosts, on which it runs; /sys still shows this one's network. Default: this one.
        stdout: a file, open or by its path, that gets what it prints; with ``stderr=subprocess.STDOUT`` all of it. Default: what
            communicate() returns.
        stderr: likewise.
    """

    def __init__(self, words, *, python=False, cwd=None, env=None, host=None, stdout=None, stderr=None):
        self.args = [*(() if python else ("-m", "muonwire")), *map(str, words)]
        self._folder = Path(tempfile.mkdtemp(prefix="muonwire-command-"))
        # Absolute, since it is opened in the command's process.
        self._output = self._place(stdout, "stdout")
        self._errors = self._output if stderr == subprocess.STDOUT else self._place(stderr, "stderr")
        places = (str(cwd or Path.cwd()), dict(os.environ if env is None else env), host)
        self._process = context.Process(
            target=_enter, args=(self.args, *places, str(self._output), str(self._errors))
        )
        self._process.start()
        self.pid = self._process.pid

    def _place(self, asked, name):
        if asked in (None, subprocess.PIPE):
            return self._folder / name
        if asked == subprocess.DEVNULL:
            return Path(os.devnull)
        return asked if isinstance(asked, Path) else Path(asked.name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, input=None, timeout=None):
        """What it printed, and what it complained of, once it ended."""
        assert input is None
        self.wait(timeout)
        said = self._output.read_text(), "" if self._errors == self._output else self._errors.read_text()
        shutil.rmtree(self._folder)
        return said

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(words, *, timeout=180, **options):
    """The outcome of a command, as of subprocess.run."""
    command = Command(words, **options)
    try:
        output, errors = command.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command.args, command.returncode, output, errors)


class ForkingPopen(subprocess.Popen):
    """subprocess.Popen, with commands and scripts of ours, on a host or not, forked from the server."""

    def __new__(cls, args, *, text=None, start_new_session=False, **options):
        words, host = [str(word) for word in args], None
        if words[:3] == ["ip", "netns", "exec"]:
            host, words = Host(address="", namespace=words[3]), words[4:]
        ours = words[1:3] == ["-m", "muonwire"] or words[1].endswith(".py")
        if words[0] == sys.executable and ours:
            return Command(words[1:], python=True, host=host, **options)
        return _Popen(args, text=text, start_new_session=start_new_session, **options)


def children_of(pid):
    """Ids of the processes that it started, with their command lines, in the order of their ids."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found[int(path.name)] = (path / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
    return dict(sorted(found.items()))
