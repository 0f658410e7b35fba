"""The errors that cross a public boundary. Each names what was received, what is allowed and the remedy."""


class UsageError(ValueError):
    """Bad input at a public boundary; the command line prints it and exits with code 2."""


class PayloadError(ValueError):
    """Bytes from outside that are not a valid payload of the expected codec, version or shape."""


class ExchangeError(RuntimeError):
    """An exchange between replicas failed."""


class ReplicaLostError(ExchangeError):
    """A replica stopped answering; ``rank`` says which, where it is known."""

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class DivergedReplicasError(ExchangeError):
    """Replicas that must hold bit-identical weights do not; the message names the first parameter."""


class NonFiniteUpdateError(ArithmeticError):
    """A loss or an update is not finite on some replica; raised on all of them in the same step, before weights move."""


class StoppedError(Exception):
    """A run ended before its last step because it was asked to (SIGTERM, Ctrl-C); a checkpoint was left."""
