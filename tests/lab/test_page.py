"""The page in a real browser: it needs nothing from outside, draws its charts, its links work, and it fits narrow screens."""

import json
import re
import shutil
import subprocess

import pytest

from muonwire.lab.catalog import load_claims
from muonwire.lab.page import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Told by the page itself once everything is drawn.
PROBE = """<script>addEventListener('load', () => setTimeout(() => {
  const links = [...document.querySelectorAll('a[href^="#"]')];
  const dead = links.filter(a => !document.getElementById(a.getAttribute('href').slice(1)));
  document.body.dataset.probe = JSON.stringify({
    width: document.documentElement.scrollWidth, window: innerWidth, dead: dead.length,
    charts: document.querySelectorAll('svg.marks, canvas.marks').length});
}, 1500));</script></body>"""


@pytest.fixture(scope="module")
def page(quick_lab):
    return write_report(list(load_claims().values()), out=quick_lab, quick=True, images=False)[0]


def test_the_page_fetches_nothing(page):
    text = page.read_text().replace("http://www.w3.org", "")
    text = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
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
    told = json.loads(found[1].replace("&quot;", '"'))
    wanted = sum(len(c.plots) for c in load_claims().values())
    assert told["charts"] == wanted
    assert told["dead"] == 0
    assert told["width"] <= max(told["window"], width)
    assert "CONSOLE" not in done.stderr or "rror" not in "".join(
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    )
