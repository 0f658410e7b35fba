"""Every claim: its rule reaches each of its verdicts on made data, its quick measurement fills what the page shows, and the page
needs nothing from outside, draws its charts, has working links and fits narrow screens in a real browser."""

import itertools
import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch

from muonwire.lab.claims.integration.precision_by_device import FAST
from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.engine.check import Check, by_seed
from muonwire.lab.engine.claim import Claim, Setting
from muonwire.lab.engine.page import write_report
from muonwire.lab.engine.verdict import VERDICTS
from muonwire.lab.inputs.training import RECIPES, TRAINING, Results
from muonwire.polar import find_processor

CLAIMS = load_claims()
MOST_COMBINATIONS = 1_000
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The page itself reports this once everything is drawn.
PROBE = """<script>addEventListener('load', () => setTimeout(() => {
  const links = [...document.querySelectorAll('a[href^="#"]')];
  const dead = links.filter(a => !document.getElementById(a.getAttribute('href').slice(1)));
  document.body.dataset.probe = JSON.stringify({
    width: document.documentElement.scrollWidth, window: innerWidth, dead: dead.length,
    charts: document.querySelectorAll('svg.marks, canvas.marks').length});
}, 1500));</script></body>"""


def triples(check: Check) -> list[tuple[float, ...]]:
    """Made values of three seeds: well inside the range, well outside, and on both sides of a bound."""
    low, high = check.range
    possible = (max(check.possible[0], -1e9), min(check.possible[1], 1e9))
    bounds = [b for b in (low, high) if possible[0] <= b <= possible[1]]
    points = sorted({*possible, *bounds})
    between = [(a + b) / 2 for a, b in itertools.pairwise(points)]
    inside = next((v for v in between if low <= v <= high), bounds[0])
    outside = next(v for v in between if not low <= v <= high)
    return [(inside,) * 3, (outside,) * 3, (inside, outside, inside)]


def combinations(choices: list[list[tuple[float, ...]]]) -> Iterator[tuple[tuple[float, ...], ...]]:
    """All ways to choose, or the uniform ones and many drawn ones where they are too many."""
    if math.prod(map(len, choices)) <= MOST_COMBINATIONS:
        yield from itertools.product(*choices)
        return
    for place in range(3):
        yield tuple(c[place] for c in choices)
    drawn = random.Random(0)
    for _ in range(MOST_COMBINATIONS):
        yield tuple(drawn.choice(c) for c in choices)


def reached(claim: Claim) -> set[str]:
    """The verdicts over combinations of made values, all or many; checks on the same rows and column share theirs."""
    keys: dict[tuple[object, ...], list[tuple[float, ...]]] = {}
    for check in claim.checks:
        key = (check.column, tuple(sorted(check.select.items(), key=str)))
        keys.setdefault(key, []).extend(triples(check))
    found = set()
    for values in combinations(list(keys.values())):
        rows = [
            {"seed": seed, column: value, **dict(select)}
            for (column, select), triple in zip(keys, values, strict=True)
            for seed, value in enumerate(triple)
        ]
        found.add(claim.decide(rows).verdict)
    return found


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_the_rule_reaches_each_verdict_and_no_other(claim):
    assert reached(claim) == set(claim.verdicts)
    assert set(claim.meaning) <= set(VERDICTS)


@pytest.fixture(scope="module")
def measured(quick_lab):
    from muonwire.lab.engine.run import rows_of

    return {c.id: rows_of(c, out=quick_lab, quick=True)[0] for c in CLAIMS.values()}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_a_quick_measurement_fills_every_check_table_and_plot(claim, measured):
    from muonwire.lab.engine.figures import excerpt_listings, pivot_table, plot_chart

    rows = measured[claim.id]
    lacking = claim.id == "integration.6" and find_processor(torch.device("cpu")).dtype == torch.float32
    for check in claim.checks:
        values = by_seed(rows, column=check.column, select=check.select)
        if lacking and check.setting.endswith(FAST):
            # Only a processor with fast 16-bit products can be limited to one without, not the other way round.
            assert not values
            continue
        assert values, f"{claim.id}: no rows for {check.name!r} {check.setting}"
        assert all(check.possible[0] <= v <= check.possible[1] for v in values), check
    for pivot in claim.tables:
        table = pivot_table(pivot, rows)
        assert table.rows, pivot.caption
        named = {tuple(c.text for c in row[: len(pivot.rows)]) for row in table.rows}
        for name in pivot.quoted:
            assert len(name) == len(pivot.rows)
        if pivot.quoted:
            shown = [c.text for row in table.rows for c in row]
            for values in pivot.quoted.values():
                assert all(v in shown for v in values.values()), (
                    f"{claim.id}: {values} is not shown beside ours; rows: {named}"
                )
    for plot in claim.plots:
        chart = plot_chart(plot, rows, claim=claim.id)
        assert chart.spec["data"]["values"], plot.name
    for excerpts in claim.excerpts:
        listings = excerpt_listings(excerpts, rows)
        assert listings
        assert all(len(group.listings) > 1 and all(one.text for one in group.listings) for group in listings)


@pytest.fixture(scope="module")
def page(quick_lab):
    return write_report(list(load_claims().values()), out=quick_lab, quick=True, images=False)[0]


def test_the_page_fetches_nothing(page):
    text = page.read_text().replace("http://www.w3.org", "")
    text = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 390])
def test_the_page_in_a_browser(page, width, tmp_path):
    probed = tmp_path / "probed.html"
    # The drawing library itself has a </body> inside a string.
    head, _, tail = page.read_text().rpartition("</body>")
    probed.write_text(head + PROBE + tail)
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},1000",
            "--virtual-time-budget=20000",
            "--dump-dom",
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    wanted = sum(len(c.plots) for c in load_claims().values())
    assert seen["charts"] == wanted
    assert seen["dead"] == 0
    assert seen["width"] <= max(seen["window"], width)
    assert "CONSOLE" not in done.stderr or "rror" not in "".join(
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    )


def test_quick_runs_are_there_for_every_recipe(quick_lab):
    first = Results(TRAINING.folder(quick_lab, quick=True), seed=0)
    for recipe in RECIPES:
        assert first[recipe].curve[-1] == (2, first[recipe].loss)


def test_another_seed_measures_other_numbers(tmp_path):
    claim = CLAIMS["topdown.6"]
    first, second = (
        list(claim.measure(Setting(seed=seed, quick=True, folder=tmp_path, inputs=claim.inputs)))
        for seed in (0, 1)
    )
    assert all(a.get("perplexity") != b.get("perplexity") for a, b in zip(first[:5], second[:5], strict=True))
