"""The data of the grid: the King James text, and three others that are made from what Python and Debian carry."""

import gzip
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muonwire.errors import UsageError
from muonwire.tasks.documents import BREAK, read_documents

# Each text is cut to this length less a line break, so that parts of equally many replicas begin where texts begin.
TEXT_BYTES = 20 * 8 * 4096 * 5


@dataclass(frozen=True, kw_only=True)
class Data:
    """One kind of data.

    Args:
        label: in tables and charts.
        texts: names of TEXTS. Default: the whole King James text.
        own: each replica draws from its own part.
        images: digits instead of text.
    """

    label: str
    texts: tuple[str, ...] = ()
    own: bool = False
    images: bool = False


def king_james() -> bytes:
    """The text of the task's default."""
    return BREAK.join(read_documents(()))


def python_sources() -> bytes:
    """The sources of Python's standard library, module by module."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return BREAK.join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def dictionary() -> bytes:
    """The GNU Collaborative International Dictionary of English, of Debian's package dict-gcide."""
    return b"".join(_of_package("dict-gcide", "usr/share/dictd/gcide.dict.dz"))


def german() -> bytes:
    """German manual pages, of Debian's package manpages-de."""
    return BREAK.join(_of_package("manpages-de", "usr/share/man/de/man*/*.gz"))


# By name: what makes the text.
TEXTS: dict[str, Callable[[], bytes]] = {
    "king_james": king_james,
    "python": python_sources,
    "dictionary": dictionary,
    "german": german,
}
DATA = {
    "dictionary": Data(label="dictionary", texts=("dictionary",)),
    "kjv": Data(label="King James"),
    "kjv_by_book": Data(label="King James, own books", own=True),
    "domains": Data(label="4 domains", texts=tuple(TEXTS)),
    "domains_own": Data(label="4 domains, own", texts=tuple(TEXTS), own=True),
    "python": Data(label="Python", texts=("python",)),
    "images": Data(label="digits", images=True),
    "images_own": Data(label="digits, own classes", images=True, own=True),
}


def _of_package(package: str, pattern: str) -> Sequence[bytes]:
    """What the files of a Debian package hold, decompressed, in the order of their paths."""
    lacks = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    with tempfile.TemporaryDirectory(prefix="muonwire-texts-") as folder:
        try:
            if lacks:
                raise UsageError(f"{' and '.join(lacks)} is missing")
            subprocess.run(
                ["apt-get", "download", package], cwd=folder, check=True, capture_output=True, text=True
            )
            (archive,) = Path(folder).glob("*.deb")
            subprocess.run(
                ["dpkg-deb", "-x", str(archive), folder], check=True, capture_output=True, text=True
            )
        except (UsageError, subprocess.CalledProcessError) as error:
            says = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
            raise UsageError(
                f"scale: Debian's package {package} cannot be fetched ({says}); run it on Debian, or put a text of at least "
                f"{TEXT_BYTES} bytes in the place that --texts names"
            ) from error
        return [gzip.decompress(path.read_bytes()) for path in sorted(Path(folder).glob(pattern))]


def text_path(name: str, folder: Path) -> Path:
    """The file of one of TEXTS, which is made if it is not there.

    Raises:
        UsageError: it cannot be made, or is too short.
    """
    path = folder / f"{name}.txt"
    if not path.exists():
        text = TEXTS[name]()[: TEXT_BYTES - len(BREAK)]
        if len(text) < TEXT_BYTES - len(BREAK):
            raise UsageError(
                f"scale: the text {name} has {len(text)} bytes; at least {TEXT_BYTES} are needed"
            )
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(text)
        partial.replace(path)
    return path


def task_options(data: str, *, size: str, texts: Path) -> dict[str, Any]:
    """The options of a comparison that choose data and model."""
    kind = DATA[data]
    if kind.images:
        # Dropout, as the transformer has it, would draw other numbers for other replicas.
        return {"task": f"vision(model='resnet', own_images={kind.own})"}
    files = tuple(text_path(name, texts) for name in kind.texts)
    return {"model_size": size, "text": files, "own_text": kind.own}
