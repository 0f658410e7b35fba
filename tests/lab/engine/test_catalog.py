"""Which claims there are, and which are chosen."""

import pytest

from muonwire.errors import UsageError
from muonwire.lab import choose, load_claims
from muonwire.lab.inputs import optimizers, training
from tests.lab.engine.toy import TOY


def test_two_claims_of_one_id_are_refused(toy, tmp_path):
    again = tmp_path / "again.py"
    again.write_text(TOY)
    with pytest.raises(UsageError, match=r"two claims are named toy\.1"):
        load_claims((toy, again))
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(UsageError, match="neither CLAIM nor CLAIMS"):
        load_claims((empty,))


def test_claims_repeat_as_often_as_their_inputs_were_made_with():
    seeds = {claim.id: claim.repeats for claim in load_claims().values()}
    assert seeds["approach.A"] == len(training.SEEDS) == 8
    assert seeds["approach.C"] == 8
    assert seeds["topdown.7"] == len(optimizers.SEEDS)
    assert seeds["integration.3"] == 5
    assert seeds["conflict.4"] == 1


def test_families_are_chosen_by_their_word():
    claims = load_claims()
    assert choose(claims, []) == list(claims.values())
    assert next(iter(choose(claims, ["integration.3", "integration"]))).id == "integration.3"
    with pytest.raises(UsageError, match="allowed are"):
        choose(claims, ["integration.99"])


@pytest.mark.parametrize(
    ("given", "instead", "message"),
    [
        (
            "    says=",
            '    source="source 000",\n    says=',
            r"toy\.py gives a claim a source; leave it out, or give note=",
        ),
        (
            "    repeats=2,",
            '    inputs=("text-training",),',
            r"inputs are \['text-training'\].*TEXT_TRAINING",
        ),
    ],
)
def test_a_claim_file_of_before_says_what_to_change(toy, given, instead, message):
    toy.write_text(TOY.replace(given, instead))
    with pytest.raises(UsageError, match=message):
        load_claims((toy,))


def test_another_type_error_in_a_claim_file_stays_what_it_is(toy):
    toy.write_text("1 + 'one'")
    with pytest.raises(TypeError, match="unsupported operand"):
        load_claims((toy,))
