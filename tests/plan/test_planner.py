"""The lines of a plan: H by the share, times and money that add up, and what is refused."""

import pytest

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.plan import CANDIDATES, Candidate, Machine, Planner, Rates, Setting, read_model
from muonwire.plan.commands import in_python
from muonwire.plan.exchanges import exchanged
from muonwire.plan.processor import ProcessorCost

MODEL = read_model("3e6")
SLOW = Rates(up_mbit_s=10, down_mbit_s=100, latency_s=0.02)
FAST = Rates(up_mbit_s=1e6, down_mbit_s=1e6)


def machine(candidates, *, step_s=0.5, per_entry_s=0.0):
    costs = {
        exchanged(form.at(1.0, steps=1000), MODEL.module).key: ProcessorCost(
            per_entry_s=per_entry_s, per_tensor_s=0.0
        )
        for c in candidates
        for form in c.forms(MODEL.module)
    }
    return Machine(compute_s=step_s - 0.1, optimizer_s={"polar": 0.1, "adam": 0.1, "plain": 0.1}, costs=costs)


def planned(candidates=CANDIDATES, *, rates=SLOW, per_entry_s=1e-9, model=MODEL, **given):
    setting = Setting(**{"replicas": 4, "steps": 1000, "share": 0.05, **given})
    return Planner(setting, model, rates, machine(candidates, per_entry_s=per_entry_s), in_python).lines(
        candidates
    )


def options_of(line):
    return recipes.parse_recipe(line.recipe)[1]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("recipe", ["one_bit_muon", "muloco", "sparseloco"])
def test_h_is_the_least_that_keeps_exchange_below_the_share(recipe, share):
    (line,) = planned([Candidate(recipe=recipe)], share=share)
    once_s, interval = line.link_s + line.processor_s, options_of(line)["interval"]
    assert line.fits
    assert once_s / (once_s + interval * line.step_s) <= share
    assert once_s / (once_s + (interval - 1) * line.step_s) > share


def test_a_growing_interval_fits_too():
    (line,) = planned([Candidate(recipe="one_bit_muon", growing=True)])
    assert line.fits
    assert 0.04 < line.share <= 0.05
    assert options_of(line)["interval"] < line.spacing


def test_times_bytes_and_money_add_up():
    for line in planned(price_per_gb=0.5):
        exchange_s = line.synchronizations * (line.link_s - line.hidden_s + line.processor_s)
        if "fragments" in line.recipe:
            # What is exchanged at once after the last step hides nothing.
            assert exchange_s < line.exchange_s < exchange_s + line.link_s
            assert line.total_up_bytes == pytest.approx(line.synchronizations * line.up_bytes, rel=0.02)
        else:
            assert line.exchange_s == pytest.approx(exchange_s)
            assert line.hidden_s == 0
            assert line.total_up_bytes == pytest.approx(line.synchronizations * line.up_bytes)
        assert line.total_s == pytest.approx(1000 * line.step_s + line.exchange_s)
        assert line.share == pytest.approx(line.exchange_s / line.total_s)
        assert line.wait_s == pytest.approx(line.exchange_s / 1000)
        # The replica that sends most sends hardly more than the others.
        assert line.money == pytest.approx(0.5 * 4 * line.total_up_bytes / 1e9, rel=0.02)
        assert f"recipes.{line.recipe.split('(')[0]}(model" in line.command


def test_what_fits_comes_first_and_then_what_costs_the_least_loss():
    lines = planned()
    keys = [(not line.fits, line.cost.expected) for line in lines]
    assert keys == sorted(keys)
    assert not next(line for line in lines if line.recipe == "muon").fits


def test_the_recommended_recipe_has_lines_at_half_and_twice_its_h():
    lines = [
        line
        for line in planned()
        if line.recipe.startswith("one_bit_muon") and not {"growth", "fragments"} & set(options_of(line))
    ]
    assert [line.fits for line in lines].count(False) == 1
    half, once, twice = sorted(options_of(line)["interval"] for line in lines)
    assert 2 * once == twice
    assert once - 1 <= 2 * half <= once + 1


def test_a_fast_link_needs_no_local_steps_and_h_never_passes_the_run():
    (line,) = planned([Candidate(recipe="one_bit_muon")], rates=FAST)
    assert options_of(line) == {"interval": 1}
    (line,) = planned([Candidate(recipe="diloco")], steps=20)
    assert options_of(line) == {"interval": 20}
    assert line.synchronizations == 1
    assert not line.fits


def test_the_processor_counts_as_exchange():
    (quick,) = planned([Candidate(recipe="one_bit_muon")], rates=FAST, per_entry_s=0.0)
    (busy,) = planned([Candidate(recipe="one_bit_muon")], rates=FAST, per_entry_s=1e-6)
    assert busy.processor_s == pytest.approx(3.0, rel=0.01)
    assert busy.spacing > 50 > quick.spacing


def test_h_of_fragments_is_the_least_that_keeps_what_is_not_hidden_below_the_share():
    rates = Rates(up_mbit_s=0.3, down_mbit_s=0.3)
    (line,) = planned([Candidate(recipe="one_bit_muon(fragments=4, delay=2)")], rates=rates)
    interval = options_of(line)["interval"]
    once_s = line.link_s - line.hidden_s + line.processor_s
    assert line.fits
    assert interval > 4
    assert once_s / (once_s + interval * line.step_s) <= 0.05
    less = line.recipe.replace(f"interval={interval}", f"interval={interval - 1}")
    assert not planned([Candidate(recipe=less)], rates=rates)[0].fits
    assert not planned([Candidate(recipe="one_bit_muon(fragments=4, delay=9)")], share=1e-6)[0].fits


@pytest.mark.parametrize(
    ("fragments", "delay", "hidden_steps"), [(1, 0, 0), (1, 3, 3), (2, 3, 6), (4, 7, 12)]
)
def test_a_fragment_hides_behind_its_delay_and_no_longer_than_until_the_next(fragments, delay, hidden_steps):
    """At 0.1 Mbit/s nothing hides wholly: in 12 steps, of 4 fragments each has 3, whatever their delay."""
    rates = Rates(up_mbit_s=0.1, down_mbit_s=0.1)
    text = f"one_bit_muon(interval=12, means='gather', fragments={fragments}, delay={delay})"
    (line,) = planned([Candidate(recipe=text)], rates=rates)
    assert line.hidden_s == pytest.approx(hidden_steps * line.step_s)
    (at_once,) = planned([Candidate(recipe="one_bit_muon(interval=12, means='gather')")], rates=rates)
    assert line.link_s == pytest.approx(at_once.link_s, rel=0.01)
    assert line.exchange_s < at_once.exchange_s or not delay


def test_on_arrival_a_result_has_until_the_next_message_to_come():
    text = "one_bit_muon(interval=12, means='gather', merge='arrival')"
    (line,) = planned([Candidate(recipe=text)], rates=Rates(up_mbit_s=0.1, down_mbit_s=0.1))
    assert line.hidden_s == pytest.approx(11 * line.step_s)
    # It depends on the link how late it is merged, and nothing is known of that.
    assert line.cost is None


def test_streaming_is_offered_where_it_saves_time():
    def streamed(rates):
        lines = planned([Candidate(recipe="one_bit_muon", streaming=True)], rates=rates)
        return [options_of(line) | {"fits": line.fits, "cost": line.cost.expected} for line in lines]

    assert streamed(FAST) == []
    (slow,) = streamed(SLOW)
    assert slow["fragments"] == 4
    # The least delay that hides a fragment costs the least loss, and H is no less than where that was measured.
    assert slow["delay"] == 1
    assert slow["interval"] == 11
    (slower,) = streamed(Rates(up_mbit_s=0.3, down_mbit_s=0.3))
    assert slower["fits"]
    assert slower["interval"] > 11
    assert slower["cost"] > slow["cost"]


def test_a_model_of_few_tensors_is_not_cut():
    few = read_model("300")
    made = Planner(
        Setting(replicas=4, steps=1000, share=0.05), few, SLOW, machine(CANDIDATES), in_python
    ).lines([Candidate(recipe="one_bit_muon", streaming=True)])
    assert made == []


@pytest.mark.parametrize(
    ("replicas", "parameters", "means"),
    [
        # Bytes decide: R − 1 = 1 bit an entry by a gather; from 4 on owners send less.
        (2, "3e6", None),
        (4, "3e6", "recompressed"),
        (16, "3e6", "recompressed"),
        # Delays decide: a gather takes one message less.
        (16, "1e4", None),
    ],
)
def test_means_are_those_that_take_the_least_time(replicas, parameters, means):
    rates, model = Rates(up_mbit_s=10, down_mbit_s=100, latency_s=0.05), read_model(parameters)
    (line,) = planned([Candidate(recipe="one_bit_muon")], rates=rates, replicas=replicas, model=model)
    assert options_of(line).get("means") == means
    assert means is None or f"means='{means}'" in line.command


def options_of_text(candidate):
    return recipes.parse_recipe(candidate.recipe)[1]


def test_lossless_means_are_chosen_where_recompressing_takes_longer():
    candidate = Candidate(recipe="one_bit_muon(interval=50)")
    slow = machine([candidate])
    costs = {
        key: ProcessorCost(per_entry_s=1e-5 if "recompressed" in key else 0.0, per_tensor_s=0.0)
        for key in slow.costs
    }
    setting = Setting(replicas=16, steps=1000, share=0.05)
    told = Machine(compute_s=0.4, optimizer_s=slow.optimizer_s, costs=costs)
    (line,) = Planner(setting, MODEL, SLOW, told, in_python).lines([candidate])
    shared = "sign(scale=shared)"
    wanted = {"interval": 50, "means": "lossless", "codec": shared, "vector_codec": shared}
    assert options_of(line) == wanted


@pytest.mark.parametrize(
    ("recipe", "means"),
    [
        ("one_bit_muon", [None, "lossless", "recompressed"]),
        ("one_bit_muon(fragments=4, delay=1)", [None, "lossless", "recompressed"]),
        ("one_bit_muon(means='gather')", ["gather"]),
        ("one_bit_muon(means='recompressed')", ["recompressed"]),
        ("one_bit_muon(codec='sign(scale=tensor)')", [None, "recompressed"]),
        ("one_bit_muon(codec='sign(scale=row)')", [None]),
        ("signmuon", [None, "lossless", "recompressed"]),
        ("muloco", [None]),
        ("muon", [None]),
    ],
)
def test_who_averages_is_chosen_for_recipes_of_signs_that_do_not_say_it(recipe, means):
    forms = Candidate(recipe=recipe).forms(MODEL.module)
    assert [options_of_text(form).get("means") for form in forms] == means


def test_an_interval_of_auto_is_the_one_that_plan_chooses():
    (chosen,) = planned([Candidate(recipe="muloco")])
    for options in ("interval='auto'", "interval='auto', share=0.1, intervals=(2, 9)"):
        (auto,) = planned([Candidate(recipe=f"muloco({options})")])
        assert auto.recipe == chosen.recipe
    with pytest.raises(UsageError, match="interval is 'auto', and muon has none"):
        planned([Candidate(recipe="muon(interval='auto')")])


def test_a_given_interval_is_kept():
    (line,) = planned([Candidate(recipe="muloco(interval=7)")])
    assert line.recipe == "muloco(interval=7)"
    assert not line.fits


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"replicas": 0}, "replicas is 0; at least 2 are needed"),
        ({"replicas": 1}, "replicas is 1; at least 2 are needed"),
        ({"steps": 0}, "steps is 0; it lies between 1 and"),
        ({"share": 0.0}, "share is 0.0; it lies between 0 and 1"),
        ({"share": 1.0}, "share is 1.0"),
        ({"share": float("nan")}, "share is nan"),
        ({"price_per_gb": -1.0}, "price_per_gb is -1.0"),
    ],
)
def test_settings_that_are_not_allowed_are_named(given, says):
    with pytest.raises(UsageError, match=says):
        Setting(**{"replicas": 4, "steps": 1000, "share": 0.05, **given})
