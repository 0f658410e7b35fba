"""Parts of torchft as ElasticTransport uses them: connections that can be made anew, and the state for a replica that joins."""

import urllib.request
import warnings
from collections.abc import Callable
from datetime import timedelta
from pickle import UnpicklingError
from typing import Any

from torchft.checkpointing import HTTPTransport
from torchft.checkpointing._serialization import _streaming_load
from torchft.process_group import ProcessGroupGloo
from typing_extensions import override

from muonwire.errors import ExchangeError


class Connections(ProcessGroupGloo):  # type: ignore[misc]
    """torchft's gloo group, which knows which quorum it connects.

    Args:
        timeout: of a message.
    """

    epoch = -1
    # What all replicas of a quorum know of it besides its number, with which a lighthouse that is started again begins anew.
    mark: Callable[[], int] = staticmethod(lambda: 0)
    # Is called before the connections of the last quorum end. They stay open as long as a message on its way is held, and where
    # they do, those at the other end wait.
    let_go: Callable[[], None] = staticmethod(lambda: None)

    @override
    def configure(self, store_addr: str, *args: Any, **options: Any) -> None:
        """Connect the replicas of a quorum; see torchft's ProcessGroup.configure."""
        self.let_go()
        self.epoch = int(options.get("quorum_id", args[3] if len(args) > 3 else self.epoch + 1))
        super().configure(f"{store_addr}/{self.mark()}", *args, **options)


class Quorums:
    """torchft's client of a manager, which keeps what the last quorum was.

    Args:
        client: torchft's ManagerClient.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._last: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def _quorum(self, **values: Any) -> Any:
        self._last = self._client._quorum(**values)
        return self._last

    @property
    def names(self) -> list[str]:
        """Of the replicas of the last quorum, by rank."""
        # torchft puts a random text behind each, which tells a replica that was started again from the one before.
        return [text.rpartition(":")[0] for text in self._last.replica_ids]

    @property
    def commits(self) -> int:
        """The most that a replica of the last quorum knows to be done."""
        return int(self._last.max_step)

    @property
    def somebody_joins(self) -> bool:
        """Whether a replica of the last quorum takes over the state of another."""
        return bool(self._last.max_world_size < self._last.replica_world_size)


class StateTransport(HTTPTransport[dict[str, Any]]):  # type: ignore[misc]
    """torchft's HTTPTransport, reached by an address rather than by the machine's name, and read without pickled code.

    Args:
        timeout: after which a transfer that brings nothing ends.
        longest: for which a transfer may go on in all.
        address: of this machine as the others reach it, in the form that a URL has.
    """

    def __init__(self, *, timeout: timedelta, longest: timedelta, address: str) -> None:
        self._host = address
        self._silence = timeout
        super().__init__(timeout=timeout, num_chunks=0)
        handler = self._server.RequestHandlerClass
        # A line on standard error for every request would tear the progress bar.
        handler.log_message = lambda *_: None
        # A socket's time limit is that of all bytes of a tensor together, however steadily they leave.
        handler.timeout = longest.total_seconds()

    @override
    def disallow_checkpoint(self) -> None:
        """Serve no more, once those that read have ended; one that froze while it read keeps what it has."""
        try:
            super().disallow_checkpoint()
        except TimeoutError:
            self._disallowed = False

    @override
    def address(self) -> str:
        """Where the state is served; the step follows."""
        return f"http://{self._host}:{self._server.socket.getsockname()[1]}/checkpoint/"

    @override
    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Fetch the state of a step from another replica."""
        return super().recv_checkpoint(src_rank, metadata, step, self._silence)

    @classmethod
    @override
    def _load_from_address(cls, address: str, timeout: timedelta) -> object:
        with (
            urllib.request.urlopen(address, timeout=timeout.total_seconds()) as file,
            warnings.catch_warnings(action="ignore", category=UserWarning),
        ):
            try:
                # Another machine's bytes: tensors, numbers and texts only.
                return _streaming_load(file, weights_only=True)
            except (RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:
                # torchft does not say how long the state is: what is missing is noticed where it is read.
                why = str(error).partition("\n")[0] or type(error).__name__
                raise ExchangeError(
                    f"the state broke off while it was fetched, or is damaged ({why})"
                ) from error
