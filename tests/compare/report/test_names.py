"""Short names, and a frontier of many recipes on which only some are written."""

import json

from muonwire.compare.report.frontier import frontier, loss_by_bits
from muonwire.compare.report.names import short_names
from muonwire.compare.report.results import read_results
from tests.compare.report.made_comparisons import Made, make_results


def shorts_of(*recipes):
    made = [Made(recipe=text, final=3.0, bits=1.0, options=options) for text, options in recipes]
    return list(short_names(read_results(*make_results(made)).recipes).values())


def test_a_name_alone_needs_no_options():
    assert shorts_of(("local_muon(interval=10)", {"interval": 10}), ("muon", {})) == ["local_muon", "muon"]


def test_variants_show_the_options_in_which_they_differ():
    assert shorts_of(
        ("m(interval=10, density=0.02, x=1)", {"interval": 10, "density": 0.02, "x": 1}),
        ("m(interval=5, density=0.02, x=1)", {"interval": 5, "density": 0.02, "x": 1}),
        ("m(x=1)", {"x": 1}),
        ("muon", {}),
        ("muon(adam=['mlp'])", {"adam": ["mlp"]}),
    ) == ["m H=10 density=0.02", "m H=5 density=0.02", "m", "muon", "muon adam=mlp"]


def test_long_names_are_cut_and_stay_apart():
    codec = "dct(chunk=64) | topk(k={}) | sign(scale=chunk)"
    found = shorts_of(
        *((f"approach_b(codec={k})", {"codec": codec.format(k)}) for k in (8, 16)), ("approach_b", {})
    )
    assert len(set(found)) == 3
    assert all(len(name) <= 30 for name in found)


def test_of_many_recipes_the_frontier_and_the_references_are_named():
    made = [Made(recipe="muon", final=3.0, bits=32.0), Made(recipe="adamw", final=3.5, bits=32.0)]
    made += [
        Made(recipe=f"r(a={i})", final=3.1 + 0.01 * (i * 7 % 34), bits=0.05 * 1.2**i, options={"a": i})
        for i in range(34)
    ]
    results = read_results(*make_results(made, spread=0.0))
    chart = loss_by_bits(results, named=("r(a=33)",))
    written = {
        row["recipe"]
        for layer in chart.spec["layer"]
        if layer["mark"]["type"] == "text"
        for row in layer["data"]["values"]
    }
    best = {results.ranking[i].recipe for i in frontier([(r.bits, r.loss) for r in results.ranking])}
    assert written <= best | {"muon", "adamw", "r(a=33)"}
    assert {"muon", "adamw"} <= written
    assert len(written) >= len(best)
    # Every recipe keeps its point and its place in the key.
    assert len(chart.key) == 36
    assert all(name in json.dumps(chart.spec) for name in (m.recipe for m in made))
    looks = {(entry.swatch.series, entry.swatch.dash) for entry in chart.key}
    assert len(looks) == 36
    few = loss_by_bits(read_results(*make_results(made[:6])))
    assert "Named are" not in " ".join(few.notes)
    assert "Named are" in " ".join(chart.notes)
