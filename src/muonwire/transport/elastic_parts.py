"""Parts of torchft as ElasticTransport uses them: connections that can be made anew, and the state for a replica that joins."""

import urllib.request
import warnings
from datetime import timedelta
from typing import Any

from torchft.checkpointing import HTTPTransport
from torchft.checkpointing._serialization import _streaming_load
from torchft.process_group import ProcessGroupGloo
from typing_extensions import override


class Connections(ProcessGroupGloo):  # type: ignore[misc]
    """torchft's gloo group, which knows which quorum it connects.

    Args:
        timeout: of a message.
    """

    epoch = -1

    @override
    def configure(self, *args: Any, **options: Any) -> None:
        """Connect the replicas of a quorum; see torchft's ProcessGroup.configure."""
        self.epoch = int(options.get("quorum_id", args[4] if len(args) > 4 else self.epoch + 1))
        super().configure(*args, **options)


class StateTransport(HTTPTransport[dict[str, Any]]):  # type: ignore[misc]
    """torchft's HTTPTransport, reached by an address rather than by the machine's name, and read without pickled code.

    Args:
        timeout: of a request.
        address: of this machine as the others reach it, in the form that a URL has.
    """

    def __init__(self, *, timeout: timedelta, address: str) -> None:
        self._host = address
        super().__init__(timeout=timeout, num_chunks=0)
        # A line on standard error for every request would tear the progress bar.
        self._server.RequestHandlerClass.log_message = lambda *_: None

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

    @classmethod
    @override
    def _load_from_address(cls, address: str, timeout: timedelta) -> object:
        with (
            urllib.request.urlopen(address, timeout=timeout.total_seconds()) as file,
            warnings.catch_warnings(action="ignore", category=UserWarning),
        ):
            # Another machine's bytes: tensors, numbers and texts only.
            return _streaming_load(file, weights_only=True)
