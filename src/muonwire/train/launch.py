"""Replicas as processes: torch's own elastic launcher, and what every process does before and after its work."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muonwire import errors
from muonwire.errors import ExchangeError, PayloadError, ReplicaLostError, StoppedError, UsageError
from muonwire.transport import ProcessGroupTransport, SingleReplica, Transport
from muonwire.transport.rendezvous import EXCHANGE_TIMEOUT_S, join
from muonwire.transport.secret import find_secret

# A replica that lost another one stays this long, so that its own end is not taken for the cause of the failure.
LINGER_S = 3.0

# What a replica needs before it starts; imported only, so that the server has no threads when it forks.
# The second is what torch imports when the first optimizer is made, in more than a second.
PRELOADED = ("muonwire.train.loop", "torch._dynamo")

# Errors that are reported in one line; any other is a bug and comes with its traceback.
_REPORTED = (UsageError, ExchangeError, PayloadError, StoppedError, SystemExit, KeyboardInterrupt)

Worker = Callable[..., None]


def under_launcher() -> bool:
    """Whether this process was started by torchrun or another launcher that sets torch.distributed's variables."""
    return all(key in os.environ for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def check_port(port: int) -> None:
    """Raise UsageError where ``port`` of the loopback interface is taken or not a port; 0 is any free one."""
    if not 0 <= port < 1 << 16:
        raise UsageError(f"port: {port} is not one; give 0 (any free one) or 1 to 65535")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(
                f"port: {port} cannot be used ({error.strerror}); choose another, or 0 for any free one"
            ) from error


@contextmanager
def process_group(
    *,
    timeout_s: float = EXCHANGE_TIMEOUT_S,
    secret_file: Path | None = None,
    allow_public: bool = False,
    inside: bool = False,
) -> Iterator[Callable[[], Transport]]:
    """The replicas of this launch: yields a function that makes a fresh transport, one for each run.

    Outside a launcher there is one replica. Where there are GPUs, each process takes the one of its LOCAL_RANK, and begins anew
    with the first where there are fewer of them than processes.

    Args:
        timeout_s: how long a replica that does not answer is waited for. Default: 600.
        secret_file: what all replicas share, so that no stranger takes part. Default: what MUONWIRE_SECRET_FILE names, or none.
        allow_public: listen without a secret where the internet may reach it. Default: no.
        inside: the replicas, or some of them, are joined by links inside a machine or a rack. Messages then travel by nccl, from
            GPU to GPU, if every process has one of its own and there is no secret. Default: they travel by gloo.
    """
    secret = find_secret(secret_file)
    if not under_launcher():
        yield SingleReplica
        return
    _take_gpu()
    backend = "nccl" if inside and secret is None else "gloo"
    interface = join(backend=backend, timeout_s=timeout_s, secret=secret, allow_public=allow_public)
    if not interface.is_loopback:
        print(f"replica {dist.get_rank()} of {dist.get_world_size()}: on {interface}", flush=True)
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    sealing = ProcessGroupTransport(secret=secret, run=run, timeout_s=timeout_s)

    def transport() -> Transport:
        made = ProcessGroupTransport(timeout_s=timeout_s)
        made.waits.limit_s = timeout_s
        return made

    end_together = False
    try:
        yield transport
        end_together = True
    except StoppedError:
        end_together = True
        raise
    finally:
        if end_together:
            sealing.close()
        _tell_refused(sealing)
        dist.destroy_process_group()


def _take_gpu() -> None:
    """Make the GPU of this process the current one, if there are any."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % count)


def _tell_refused(transport: ProcessGroupTransport) -> None:
    for peer, kinds in transport.refused.items():
        if kinds:
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            print(
                f"replica {transport.rank} refused {kinds.total()} message(s) that came as replica {peer}'s: {counts}",
                flush=True,
            )


@contextmanager
def on_stop_signal(request_stop: Callable[[], None]) -> Iterator[None]:
    """Within the block SIGTERM and SIGINT call ``request_stop`` instead of ending the process; a second one ends it."""

    def handle(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        request_stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_threads(replicas: int, threads: int | None) -> None:
    """Threads of this replica's arithmetic: as asked, or its share of the cores."""
    torch.set_num_threads(threads or max((os.cpu_count() or 1) // replicas, 1))


def start_method(modules: Sequence[str] = ()) -> str:
    """How worker processes start: from a server that has imported the libraries once, where the system has one.

    Importing torch and transformers takes seconds of a core; starting each replica afresh pays them for every one.

    Args:
        modules: by name, that it imports besides. Default: none.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload([*PRELOADED, *modules])
    return "forkserver"


def _enter(worker: Worker, args: Sequence[Any], errors_folder: str) -> None:
    """What each replica's process runs: the worker, its failure written where the launcher finds it."""
    rank = int(os.environ["RANK"])
    try:
        worker(*args)
    except BaseException as error:
        record = {
            "type": type(error).__name__,
            "message": str(error),
            "lost_rank": getattr(error, "rank", None),
        }
        (Path(errors_folder) / f"rank_{rank}.json").write_text(json.dumps(record))
        if isinstance(error, ReplicaLostError):
            time.sleep(LINGER_S)
        if not isinstance(error, _REPORTED):
            raise
        # The launcher reports the reason; a traceback of every replica would bury it. An ordinary end would wait for the launcher
        # to fetch a return value, which it does not do once it has been signalled.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def launch(
    worker: Worker, args: Sequence[Any], *, replicas: int, port: int = 0, modules: Sequence[str] = ()
) -> None:
    """Run ``worker(*args)`` in ``replicas`` processes of this machine and wait for them.

    Args:
        worker: importable by name; finds its rank as under torchrun.
        args: picklable.
        replicas: number of processes, at least 1.
        port: of the rendezvous on the loopback interface. Default: any free one.
        modules: see start_method.

    Raises:
        UsageError: a bad number of replicas or port, or what a worker raised as such.
        ReplicaLostError: a replica was killed; names its rank and the signal.
        ExchangeError: a replica failed; names its rank and the error.
        StoppedError: the replicas stopped because they were asked to.
    """
    if replicas < 1:
        raise UsageError(f"replicas: {replicas}; at least 1 is needed")
    check_port(port)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=replicas,
        run_id=f"muonwire-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method=start_method(modules),
    )
    folder = tempfile.mkdtemp(prefix="muonwire-errors-")
    try:
        elastic_launch(config, _enter)(worker, list(args), folder)
    except ChildFailedError as error:
        raise _explain(error.failures, Path(folder), replicas) from error
    except SignalException as error:
        raise _explain({}, Path(folder), replicas, default=StoppedError(str(error))) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _explain(failures: Any, folder: Path, replicas: int, default: Exception | None = None) -> Exception:
    """The cause among everything that the failed processes left: a kill before an error, an error before its consequences."""
    records = {
        int(p.stem.removeprefix("rank_")): json.loads(p.read_text())
        for p in sorted(folder.glob("rank_*.json"))
    }
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and rank not in records:
            name = signal.Signals(-failure.exitcode).name
            return ReplicaLostError(
                f"replica {rank} of {replicas} (process {failure.pid}) was ended by {name}; the others stopped. "
                "Run the same command with --resume to continue from the last checkpoint",
                rank=rank,
            )
    causes = {r: rec for r, rec in records.items() if rec["type"] != "ReplicaLostError"} or records
    for rank, record in causes.items():
        kind = getattr(errors, record["type"], None)
        if kind is ReplicaLostError:
            return ReplicaLostError(record["message"], rank=record["lost_rank"])
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind(record["message"])
        return ExchangeError(
            f"replica {rank} of {replicas} failed with {record['type']}: {record['message']}"
        )
    if default is not None:
        return default
    rank, failure = next(iter(sorted(failures.items())))
    return ExchangeError(
        f"replica {rank} of {replicas} ended with exit code {failure.exitcode} and left no message"
    )
