"""Which replicas share the folder of a run, and what every host's folder says of the others."""

import contextlib
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from muonwire.train.told import raise_told, tell
from muonwire.transport.base import Transport

WHERE = "where.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a replica keeps what it needs.

    Args:
        host: the name of its machine.
        folder: of the run there.
    """

    host: str
    folder: str

    @classmethod
    def here(cls, folder: Path) -> Self:
        """That of this replica."""
        return cls(host=socket.gethostname(), folder=str(folder.absolute()))

    def __str__(self) -> str:
        return f"{self.host}:{self.folder}"


@dataclass(frozen=True, kw_only=True)
class Together:
    """The replicas that share this replica's folder.

    Args:
        ranks: of them, this one among them, in order.
        rank: of this replica.
        launch: a name of this launch, the same on all replicas and no other launch's.
    """

    ranks: Sequence[int]
    rank: int
    launch: str

    @property
    def first(self) -> bool:
        """Whether this replica writes what the folder holds once."""
        return self.rank == self.ranks[0]

    @classmethod
    def find(cls, folder: Path, transport: Transport) -> Self:
        """Find out, by a file that every replica leaves for a moment; all replicas call it together.

        Neither a host's name nor a path says whether two replicas have one folder: hosts may share a disk, or have folders of the
        same name on disks of their own.

        Raises:
            UsageError: a folder cannot be written; on all replicas.
        """
        own, mark = secrets.token_hex(8), folder / f".replica_{transport.rank}"
        problem = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(own)
        except OSError as error:
            problem = (
                f"the folder {folder} cannot be written ({error}); make room there, or choose another --out"
            )
        try:
            told = tell({"token": own, "problem": problem}, transport)
            raise_told({rank: message["problem"] for rank, message in enumerate(told)})
            tokens = [message["token"] for message in told]
            ranks = [
                rank
                for rank, token in enumerate(tokens)
                if rank == transport.rank or _read(folder / f".replica_{rank}") == token
            ]
            transport.gather(b"looked", purpose="control")
        finally:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)
        return cls(ranks=ranks, rank=transport.rank, launch=tokens[0])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def where(places: Sequence[Place], together: Together, *, files: Sequence[str]) -> dict[str, Any]:
    """What the folder of a host without replica 0 says of the run.

    Args:
        places: of all replicas, by rank.
        together: the replicas of this folder.
        files: what replica 0 writes.
    """
    address = os.environ.get("MASTER_ADDR")
    return {
        "files": [*files],
        "are_written_by": {
            "replica": 0,
            "host": places[0].host,
            "address": address,
            "folder": places[0].folder,
        },
        "this_folder": {
            "replicas": [*together.ranks],
            "host": places[together.rank].host,
            "holds": "checkpoints",
        },
    }
