"""The written report: whole, offline, valid and safe."""

import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser

import altair as alt
import pytest
import vl_convert

from muonwire.compare.report import compare_page, read_results, write_compare_report
from muonwire.errors import UsageError
from muonwire.pages import Chart, Page, Section, render_page
from muonwire.pages import page as page_module
from muonwire.pages.page import VEGA_LITE_VERSION, without_legends
from tests.compare.report.made_comparisons import FOUR, Made, make_results, make_setting

HOSTILE = "</script><script>alert(1)</script>"
NAMES = (
    "loss_by_steps",
    "loss_by_bytes",
    "loss_by_bits",
    "loss_by_link_time",
    "loss_by_measured_time",
    "step_time_link",
    "step_time_measured",
    "loss_by_rate",
)


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, html):
        super().__init__()
        self.found, self.scripts, self._script = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._script = tag == "script"

    def handle_data(self, data):
        if self._script:
            self.scripts.append(data)
            self._script = False


def page_of(recipes=FOUR, *, seeds=(0,), replicas=4, **changes):
    results = read_results(*make_results(recipes, seeds=seeds, replicas=replicas))
    return compare_page(setting=make_setting(seeds=seeds, replicas=replicas, **changes), results=results)


def with_little_data(spec):
    """``spec`` with two rows of each of its data sets, as checking them all takes seconds."""
    if isinstance(spec, dict):
        return {k: v[:2] if k == "values" else with_little_data(v) for k, v in spec.items()}
    return [with_little_data(part) for part in spec] if isinstance(spec, list) else spec


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    summary, curves = make_results(FOUR)
    return write_compare_report(folder, setting=make_setting(), summary=summary, curves=curves)


def test_a_page_with_the_best_rates_of_an_earlier_search_says_so():
    before = "Learning rates searched before"
    searched = render_page(page_of(lr_searched=(0.001, 0.003, 0.01, 0.03)))
    assert before in searched
    assert "it covered 0.001, 0.003, 0.01, 0.03" in searched
    assert "the grid that was searched before" in searched
    assert "the grid may be too narrow" not in searched
    plain = render_page(page_of())
    assert before not in plain
    assert "the grid may be too narrow" in plain


def test_everything_is_written(written):
    assert [path.name for path in written] == ["report.html", *(f"{name}.png" for name in NAMES)]
    for path in written[1:]:
        image = path.read_bytes()
        assert image.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", image[16:24])
        assert width >= 1100
        assert height >= 400
        assert len(image) > 20_000


def test_page_fetches_nothing(written):
    html = written[0].read_text(encoding="utf-8")
    for tag, attributes in Elements(html).found:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            value = attributes.get(name) or ""
            assert "//" not in value, (tag, value)
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "default-src 'none'" in html
    assert html.count("window.vegaEmbed=") == 1


def test_page_holds_its_specs_and_configurations(written):
    scripts = Elements(written[0].read_text(encoding="utf-8")).scripts
    parsed = [json.loads(text) for text in scripts if text.startswith("{")]
    assert len([spec for spec in parsed if "layer" in spec]) == len(NAMES)
    assert set(parsed[-1]) == {"light", "dark"}


def test_page_is_the_same_again(written):
    summary, curves = make_results(FOUR)
    page = compare_page(setting=make_setting(), results=read_results(summary, curves))
    assert render_page(page) == written[0].read_text(encoding="utf-8")


def test_specs_are_valid():
    diverging = Made(recipe="diverging", final=3.3, bits=4.0, diverged_seeds=(0,))
    charts = page_of((*FOUR, diverging), seeds=(0, 1, 2)).charts
    assert tuple(chart.name for chart in charts) == NAMES
    for chart in charts:
        alt.LayerChart.from_dict(with_little_data(chart.spec), validate=True)
        for spec in (chart.spec, without_legends(chart.spec)):
            vega = vl_convert.vegalite_to_vega(dict(spec), vl_version=VEGA_LITE_VERSION)
            assert vega["marks"]
        assert chart.spec["width"] == "container"
        assert "NaN" not in json.dumps(chart.spec)


def test_page_specs_have_no_legend():
    for chart in page_of().charts:
        vega = vl_convert.vegalite_to_vega(without_legends(chart.spec), vl_version=VEGA_LITE_VERSION)
        assert not vega.get("legends")
        # A Voronoi overlay would read the text fields of tooltips from the wrong object.
        assert "voronoi" not in json.dumps(vega)


def test_hostile_names_stay_text():
    page = page_of(
        (replace(FOUR[0], recipe=HOSTILE, chain='<img src="x" onerror="alert(2)">'), FOUR[1]),
        title="<b>title</b>",
        notes=("<script>alert(3)</script>",),
        command="a && <b>",
    )
    html = render_page(page)
    assert "alert(1)</script>" not in html
    assert "alert(3)</script>" not in html
    elements = Elements(html).found
    assert not [tag for tag, attributes in elements if "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in elements) == len(page.charts) + 3
    assert HOSTILE in [attributes.get("data-selects") for _, attributes in elements]


def test_diverged_and_edge_are_in_the_table():
    html = render_page(page_of((FOUR[0], FOUR[2], replace(FOUR[1], diverged_seeds=(0,)))))
    assert '<em class="flag">diverged</em>' in html
    assert '<em class="flag">edge</em>' in html
    assert html.count('<span class="unseen"> (best)</span>') >= 5


def test_one_replica_has_no_chart_of_bytes():
    names = [chart.name for chart in page_of(replicas=1).charts]
    assert "loss_by_bytes" not in names
    assert "loss_by_bits" not in names
    assert "loss_by_steps" in names


def test_everything_diverged_still_makes_a_page():
    page = page_of([replace(made, diverged_seeds=(0,)) for made in FOUR])
    assert "nothing to rank" in render_page(page)


def test_losses_missing_from_the_start():
    summary, curves = make_results(FOUR[:2])
    curves = curves.with_columns(eval_loss=None)
    summary = [row | {"final_eval_loss": None, "diverged": True} for row in summary]
    names = [
        c.name for c in compare_page(setting=make_setting(), results=read_results(summary, curves)).charts
    ]
    assert names == ["step_time_link", "step_time_measured"]


def test_single_rate_has_no_sweep():
    one = [replace(made, lrs=(0.01,), best=0) for made in FOUR]
    assert "loss_by_rate" not in [chart.name for chart in page_of(one).charts]


def test_twenty_five_recipes():
    recipes = [Made(recipe=f"recipe {i}", final=3.3 + 0.02 * i, bits=32 / (i + 1)) for i in range(25)]
    looks = {(entry.swatch.series, entry.swatch.dash) for entry in page_of(recipes).charts[0].key}
    assert len(looks) == 25


def test_charts_need_names_of_their_own():
    chart = Chart(name="a", title="A", how_to_read="", spec={})
    with pytest.raises(UsageError, match="several charts are named"):
        render_page(
            Page(title="t", lead="", sections=(Section(title="s", anchor="s", blocks=(chart, chart)),))
        )
    with pytest.raises(UsageError, match="no plain file name"):
        Chart(name="../a", title="A", how_to_read="", spec={})


def test_vega_is_made_once_and_kept_where_that_is_possible(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        page_module.vl_convert, "javascript_bundle", lambda **_: made.append(1) or "let a; // </script"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def bundle():
        page_module._vega_bundle.cache_clear()
        return page_module._vega_bundle()

    try:
        assert bundle() == bundle() == r"let a; // <\/script"
        assert len(made) == 1
        (kept,) = (tmp_path / "cache" / "muonwire").iterdir()
        kept.write_bytes(b"\xff")
        assert bundle() == bundle()
        assert len(made) == 2
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert bundle() == bundle()
        assert len(made) == 4
    finally:
        page_module._vega_bundle.cache_clear()
