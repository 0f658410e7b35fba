"""Predicting text, generating it, and sweeping edits."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muonwire.errors import UsageError
from muonwire.spectra.chat import chat
from muonwire.spectra.edit import edit_model
from muonwire.spectra.edits import Drop, PolarFactor, parse_edits
from muonwire.spectra.likeness import Reference, log_probabilities, text_windows
from muonwire.spectra.models import ByteTokens, Opened
from muonwire.spectra.sweep import SWEEP, Editor, Point, sweep
from muonwire.spectra.talk import Sampling, answer, repetition, stream
from tests.small_lm import small_llama
from tests.spectra.conftest import KINDS, build_small

TEXT = "In the beginning God created the heaven and the earth. " * 20


def _opened(kind: str = "llama", *, seed: int = 0) -> Opened:
    return Opened(name=kind, model=build_small(kind, seed=seed), tokens=ByteTokens())


def _reference(opened: Opened) -> Reference:
    return Reference(opened, text_windows(opened, TEXT, windows=3, length=20))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_kl_are_those_of_torch(kind: str) -> None:
    """Against the model's own loss, and torch's divergence."""
    one, other = _opened(kind), _opened(kind, seed=1)
    reference = _reference(one)
    assert reference.itself.kl == pytest.approx(0.0, abs=1e-6)
    assert reference.itself.agreement == 1.0
    assert reference.itself.num_tokens == 3 * 19
    found = reference.compare(other.model)
    with torch.no_grad():
        own = [float(other.model(input_ids=w[None], labels=w[None]).loss) for w in reference.windows]
        p = torch.cat([log_probabilities(one.model, w) for w in reference.windows])
        q = torch.cat([log_probabilities(other.model, w) for w in reference.windows])
    assert found.loss == pytest.approx(sum(own) / 3, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    want = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
    assert found.kl == pytest.approx(want, rel=0.02)
    assert found.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())


def test_windows_are_spread_over_the_text() -> None:
    """The first at its start, none past its end; too short a text is refused."""
    opened = _opened()
    windows = text_windows(opened, "".join(chr(i) for i in range(32, 120)), windows=4, length=10)
    assert windows[:, 0].tolist() == [32, 54, 76, 98]
    with pytest.raises(UsageError, match="do not give 4 windows of 30 tokens"):
        text_windows(opened, "x" * 100, windows=4, length=30)


def test_different_vocabularies_are_refused() -> None:
    """They have no distribution in common."""
    with pytest.raises(UsageError, match="vocabularies of 256 and 300"):
        _reference(_opened()).compare(small_llama(vocabulary=300))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_transformers(kind: str) -> None:
    """With our cache and without it: the same tokens."""
    opened = _opened(kind)
    ids = ByteTokens().encode("In the beg")
    ours = list(stream(opened, ids, Sampling(max_tokens=20)))
    generate = opened.model.generate  # type: ignore[operator]
    theirs = generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert ours == theirs[0, len(ids) :].tolist()


def test_the_context_slides_past_its_longest() -> None:
    """A model of 64 positions goes on, on the last 64 tokens."""
    opened = _opened("gpt2")
    assert len(list(stream(opened, list(range(60)), Sampling(max_tokens=20)))) == 20


def test_samples_follow_the_seed_and_the_distribution() -> None:
    """The same seed: the same; another: another one. A tiny top_p is greedy."""
    opened = _opened()
    ids = ByteTokens().encode("God")
    hot = [list(stream(opened, ids, Sampling(max_tokens=30, temperature=1.0, seed=s))) for s in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    greedy = list(stream(opened, ids, Sampling(max_tokens=10)))
    assert list(stream(opened, ids, Sampling(max_tokens=10, temperature=1.0, top_p=1e-9))) == greedy


def test_equal_models_say_the_same_at_any_temperature() -> None:
    """The random numbers are drawn by place, not by model."""
    one, other = _opened(), _opened()
    edit_model(other.model, parse_edits(["flatten(power=1.0)"]))
    sampling = Sampling(max_tokens=15, temperature=0.7)
    assert answer(one, "Let there be", sampling).text == answer(other, "Let there be", sampling).text


def test_answers_count_what_is_repeated() -> None:
    """A model that says one token forever repeats nearly everything."""
    opened = _opened()
    with torch.no_grad():
        for param in opened.model.parameters():
            param.zero_()
    said = answer(opened, "Why?", Sampling(max_tokens=12))
    assert (said.num_tokens, said.ended) == (12, False)
    assert said.repetition == repetition([0] * 12) == pytest.approx(8 / 9)
    with pytest.raises(UsageError, match="write something"):
        answer(opened, "", Sampling())
    with pytest.raises(UsageError, match="no tokenizer"):
        answer(Opened(name="x", model=opened.model), "Why?", Sampling())


def test_a_sweep_tries_and_undoes() -> None:
    """What it measures is what editing gives; the model is as it was."""
    opened = _opened()
    before = {n: p.detach().clone() for n, p in opened.model.named_parameters()}
    reference = _reference(opened)
    points = (
        Point(name="polar", strength=1.0, edit=PolarFactor()),
        Point(name="drop", strength=0.5, edit=Drop(fraction=0.5)),
    )
    found = list(sweep(opened.model, reference, kinds=("attention", "mlp"), points=points))
    assert [(kind, p.name) for kind, p, _ in found] == [
        ("attention", "polar"),
        ("attention", "drop"),
        ("mlp", "polar"),
        ("mlp", "drop"),
    ]
    for name, param in opened.model.named_parameters():
        assert torch.equal(param, before[name]), name
    edited = _opened()
    edit_model(edited.model, parse_edits(["drop(fraction=0.5, kind='mlp')"]))
    want = reference.compare(edited.model)
    assert found[3][2].loss == pytest.approx(want.loss, rel=1e-4)
    assert found[3][2].kl > 0


def test_a_sweep_refuses_what_it_has_not_kept() -> None:
    """Rather than leave a weight changed."""
    opened = _opened()
    editor = Editor(opened.model, ("attention",))
    before = {n: p.detach().clone() for n, p in opened.model.named_parameters()}
    with pytest.raises(UsageError, match="not among the kinds"):
        editor.tried(PolarFactor(), _reference(opened).compare)
    assert all(torch.equal(p, before[n]) for n, p in opened.model.named_parameters())


def test_the_sweep_is_wide_enough() -> None:
    """Eight edits at several strengths at least, and controls."""
    several = {p.name for p in SWEEP if sum(q.name == p.name for q in SWEEP) > 2}
    assert len(several) >= 6
    assert len({p.name for p in SWEEP}) >= 8
    assert {"rotate (control)", "permute (control)"} <= {p.name for p in SWEEP}


def test_chat_answers_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Each model in a panel of its own; /new forgets, an empty line ends."""
    opened = [_opened(), _opened(seed=1)]
    lines = iter(["Let there be\n", "/new\n", "light\n", "\n", "never asked\n"])
    chat(opened, ["one", "other"], Sampling(max_tokens=4), lines=lines)
    shown = capsys.readouterr().out
    assert shown.count("one") == shown.count("other") == 2
    assert next(lines) == "never asked\n"


def test_a_folder_with_a_tokenizer_keeps_it(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The written model talks the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from muonwire.spectra.edit import write_model
    from muonwire.spectra.models import HubTokens, open_model

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "light": 1, "be": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = saved("llama")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    written = write_model(open_model(str(folder), device="cpu"), tmp_path / "out")
    tokens = open_model(str(written), device="cpu").tokens
    assert isinstance(tokens, HubTokens)
    assert tokens.encode("be light") == [2, 1]


def test_a_model_that_overflows_has_a_place_on_the_pages() -> None:
    """Infinite loss, perplexity and divergence are shown as such."""
    from muonwire.pages import render_page
    from muonwire.spectra.compare_page import likeness_table
    from muonwire.spectra.likeness import Likeness
    from muonwire.spectra.sweep_page import sweep_page

    whole = Likeness(loss=2.0, kl=0.0, agreement=1.0, num_tokens=8)
    broken = Likeness(loss=math.inf, kl=math.inf, agreement=0.0, num_tokens=8)
    assert [c.text for c in likeness_table(("a", "b"), (whole, broken)).rows[1]][1:4] == ["inf"] * 3
    point = Point(name="polar", strength=1.0, edit=PolarFactor())
    page = render_page(sweep_page("a", whole, [("*_Proj", point, whole), ("*_Proj", point, broken)]))
    assert "inf" in page
