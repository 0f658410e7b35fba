"""A secret that all replicas of a run share, and the tags that it makes.

A tag is BLAKE2b with a key (RFC 7693, section 2.9) of 16 bytes: whoever lacks the secret makes a valid one with probability
2⁻¹²⁸ in each try. Nothing is encrypted.
"""

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typing_extensions import Buffer

from muonwire.errors import UsageError

TAG_BYTES = 16
SMALLEST_SECRET_BYTES = 16
VARIABLE = "MUONWIRE_SECRET_FILE"
_KEY_BYTES = 32
_FEWEST_VALUES = 8
_READABLE_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MAKE = "make one with `muonwire secret FILE`, and copy it to every machine"


class Secret:
    """What only the replicas of a run know. It is never written, sent, printed or pickled.

    Args:
        content: at least 16 random bytes; white space around them does not count.

    Raises:
        UsageError: they are too few, or the same few again and again.

    >>> secret = Secret(bytes(range(32)))
    >>> len(secret.tag([b"a message"])), secret
    (16, Secret(...))
    """

    def __init__(self, content: bytes) -> None:
        self._set(content, "the secret")

    def _set(self, content: bytes, name: str) -> None:
        content = content.strip()
        if len(content) < SMALLEST_SECRET_BYTES or len(set(content)) < _FEWEST_VALUES:
            raise UsageError(
                f"secret: {name} has {len(content)} bytes, {len(set(content))} of them different; at least {SMALLEST_SECRET_BYTES} "
                f"random bytes are needed: {_MAKE}"
            )
        self._key = hashlib.blake2b(content, digest_size=_KEY_BYTES, person=b"muonwire secret").digest()

    @classmethod
    def read(cls, path: Path) -> "Secret":
        """The secret in a file that only its owner may read.

        Raises:
            UsageError: there is no such file, others may read it, or its content is too short.
        """
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read(1 << 16)
        except OSError as error:
            raise UsageError(f"secret: {path} cannot be read ({error.strerror}); {_MAKE}") from error
        if mode & _READABLE_BY_OTHERS:
            raise UsageError(
                f"secret: {path} has mode {mode:03o}, so others on this machine can reach it; run chmod 600 {path}"
            )
        secret = cls.__new__(cls)
        secret._set(content, str(path))
        return secret

    def derive(self, parts: Iterable[Buffer]) -> "Secret":
        """Another secret, which follows from this one and ``parts``."""
        made = Secret.__new__(Secret)
        made._key = self._digest(parts, _KEY_BYTES, b"muonwire derive")
        return made

    def tag(self, parts: Iterable[Buffer]) -> bytes:
        """The 16 bytes that show who holds the secret that ``parts``, one after the other, come from one who holds it, too."""
        return self._digest(parts, TAG_BYTES, b"muonwire tag")

    def verifies(self, tag: Buffer, parts: Iterable[Buffer]) -> bool:
        """Whether ``tag`` is that of ``parts``; the time it takes does not depend on where they differ."""
        return hmac.compare_digest(tag, self.tag(parts))

    def _digest(self, parts: Iterable[Buffer], size: int, purpose: bytes) -> bytes:
        made = hashlib.blake2b(key=self._key, digest_size=size, person=purpose)
        for part in parts:
            made.update(part)
        return made.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._key, other._key)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise: a secret does not leave the process.

        Raises:
            UsageError: always.
        """
        raise UsageError("Secret: a secret cannot be pickled; read its file where it is needed")


def find_secret(path: Path | None = None) -> Secret | None:
    """The secret in ``path``, or else in the file that MUONWIRE_SECRET_FILE names; none where neither is given.

    Raises:
        UsageError: the file cannot serve.
    """
    named = os.environ.get(VARIABLE, "")
    if path is None and not named:
        return None
    return Secret.read(path if path is not None else Path(named))


def write_secret(path: Path) -> None:
    """Write a new secret of 32 random bytes, as hexadecimal digits, into a new file that only its owner may read.

    Raises:
        UsageError: there is something at ``path`` already, or it cannot be written.
    """
    try:
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UsageError(f"secret: {path} cannot be made ({error.strerror}); choose a new file") from error
    with os.fdopen(opened, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
