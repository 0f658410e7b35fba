import pyarrow as arrow
import pytest
from pyarrow import parquet

from muonwire.errors import UsageError
from muonwire.tasks.documents import read_documents

ROWS = ["first", "", None, "  \n", "second, with ü"]
DOCUMENTS = [b"first", "second, with ü".encode()]


def write_parquet(path, columns):
    parquet.write_table(arrow.table(columns), path)
    return path


def test_files_are_documents_and_rows_of_parquet_files_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"plain \xff text")
    rows = write_parquet(tmp_path / "b.parquet", {"text": ROWS, "n": range(5)})
    assert read_documents([tmp_path / "a.txt", rows]) == [b"plain \xff text", *DOCUMENTS]


def test_a_column_of_another_name(tmp_path):
    rows = write_parquet(tmp_path / "b.parquet", {"text": ["x"] * 5, "story": ROWS})
    assert read_documents([rows], column="story") == DOCUMENTS


@pytest.mark.parametrize("kind", ["saved", "saved splits", "data files"])
def test_a_data_set_follows_the_files(kind, tmp_path):
    import datasets

    folder = tmp_path / "set"
    data = datasets.Dataset.from_dict({"text": ROWS})
    other = datasets.Dataset.from_dict({"text": ["unseen"]})
    if kind == "saved":
        data.save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": other, "test": data}).save_to_disk(folder)
    else:
        folder.mkdir()
        write_parquet(folder / "train.parquet", {"text": ["unseen"]})
        write_parquet(folder / "test.parquet", {"text": ROWS})
    (tmp_path / "a.txt").write_text("plain")
    split = "test" if kind != "saved" else "train"
    assert read_documents([tmp_path / "a.txt"], dataset=str(folder), split=split) == [b"plain", *DOCUMENTS]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"story": ["x"], "n": [1]}, "has no column 'text'; name one of story, n with --column"),
        ({"text": [3]}, "holds int, not text"),
        ({"text": ["", None]}, "holds no text"),
        (None, "cannot be read .*; give a Parquet file"),
    ],
)
def test_bad_columns_say_what_is_there(columns, says, tmp_path):
    path = tmp_path / "b.parquet"
    if columns is None:
        path.write_bytes(b"PAR1 but not")
    else:
        write_parquet(path, columns)
    with pytest.raises(UsageError, match=says):
        read_documents([path])


@pytest.mark.parametrize("missing", ["folder", "split"])
def test_a_data_set_that_is_not_there_says_how_it_is_named(missing, tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set/train.parquet", {"text": ROWS})
    name, split = ("nothing", "train") if missing == "folder" else ("set", "other")
    with pytest.raises(UsageError, match=r"split .* cannot be loaded .*NAME:CONFIGURATION"):
        read_documents([], dataset=str(tmp_path / name), split=split)
