"""The documentation as a site: what can be checked without building it. `make site` builds it and checks the rest."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(nav):
    """The files that the navigation names."""
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else entries(value)


def anchors(page):
    """The anchors of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = [re.sub(r"[`*]", "", h) for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    named = set(re.findall(r'<a id="([^"]+)">', text))
    return named | {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def test_every_page_is_in_the_navigation_once_and_every_entry_exists():
    named = sorted(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = [str(page.relative_to(DOCS)) for page in PAGES]
    notebooks = [str(path.relative_to(DOCS).with_suffix(".md")) for path in DOCS.rglob("*.ipynb")]
    assert named == sorted(pages + notebooks)


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_relative_links_lead_to_a_file_and_an_anchor(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if target.suffix == ".md" and target.with_suffix(".ipynb").exists():
            target = target.with_suffix(".ipynb")
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_pages_link_to_nothing_outside_the_site(page):
    links = LINK.findall(CODE.sub("", page.read_text()))
    assert [
        link for link in links if not (page.parent / link.partition("#")[0]).resolve().is_relative_to(DOCS)
    ] == []


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="top">Title</h1><a href="other.html#here">there</a><img src="a.png">'
    )
    (tmp_path / "other.html").write_text(
        '<h2 id="here">Here</h2><a href="https://example.org/">elsewhere</a>'
    )
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "style.css").write_text("a { color: red }")
    return tmp_path


def problems(check, site):
    pages = {path: check.Page(path) for path in sorted(site.rglob("*.html"))}
    return [*check.broken_links(pages), *check.remote_loads(site, pages)]


def test_the_check_of_the_built_site_accepts_a_sound_one(site):
    assert problems(load("check"), site) == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("other.html", "<p>no anchor</p>", "anchor that is not there"),
        ("third.html", '<a href="nowhere.html">there</a>', "leads nowhere"),
        ("third.html", '<img src="nowhere.png">', "leads nowhere"),
        ("third.html", '<script src="https://example.org/a.js"></script>', "loads https://example.org/a.js"),
        ("third.html", '<link rel="stylesheet" href="//example.org/a.css">', "loads //example.org/a.css"),
        ("third.html", '<pre class="mermaid"></pre>', "unpkg.com"),
        (
            "style.css",
            "a { background: url('https://example.org/a.png') }",
            "loads https://example.org/a.png",
        ),
        ("style.css", '@import "https://example.org/a.css";', "loads https://example.org/a.css"),
    ],
)
def test_the_check_of_the_built_site_finds_what_is_wrong(site, name, text, complaint):
    (site / name).write_text(text)
    (problem,) = problems(load("check"), site)
    assert complaint in problem


def test_the_check_wants_every_public_name_once(tmp_path):
    check = load("check")
    (tmp_path / "api").mkdir()
    (tmp_path / "recipes.html").write_text("")
    for room in check.ROOMS:
        (tmp_path / "api" / f"{room}.html").write_text("")
    names = [
        f'<h2 id="muonwire.optim.{name}">' for name in ("Route", "Route", "Routing", "chain.ChainOptimizer")
    ]
    (tmp_path / "api" / "optim.html").write_text("".join(names))
    pages = {path: check.Page(path) for path in tmp_path.rglob("*.html")}
    wrong = [line for line in check.misplaced_names(tmp_path, pages) if line.startswith("muonwire.optim.")]
    times = {"Lifecycle": 0, "LocalSteps": 0, "Route": 2, "local_steps": 0, "route": 0}
    assert wrong == [f"muonwire.optim.{name} is documented {n} times" for name, n in times.items()]


def test_the_notebook_trains_shows_the_page_and_reads_a_spectrum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    page = load("notebooks").to_markdown(DOCS / "first_run.ipynb", names)
    losses = {entry["recipe"]: entry["final_eval_loss"] for entry in names["summary"]}
    assert set(losses) == {"muon", "one_bit_muon"}
    # An untrained model's loss is log 256 = 5.5 nats a byte.
    assert max(losses.values()) < 3.5
    assert names["loss"] < 3.5
    assert (tmp_path / "runs" / "first_run" / "report.html").stat().st_size > 100_000
    assert page.count("data:image/png;base64,") == 2
    assert names["table"]["model"].unique().sort().to_list() == ["after", "before"]
    assert names["table"]["effective_rank"].is_between(0.1, 1.0).all()


def test_a_cell_shows_what_it_prints_and_its_last_value():
    run, names = load("notebooks").run, {}
    assert run("print('a < b')\nx = 3", names) == ['<pre class="output">a &lt; b</pre>']
    assert run("x + 1", names) == ['<pre class="output">4</pre>']
    assert run("None", names) == []
    with pytest.raises(NameError):
        run("y", names)


def test_the_cells_are_stored_without_outputs():
    for path in DOCS.rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert cell.get("outputs", []) == []


def test_doctests_and_literal_blocks_of_docstrings_become_code(monkeypatch):
    # The site's packages are not among those of the tests.
    parts = dict.fromkeys(("Attribute", "Docstring", "Object"))
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, **parts))
    to_markdown = load("docstrings").to_markdown
    assert to_markdown("Twice.\n\n>>> twice(2)  # doctest: +SKIP\n4\n\nMore.") == (
        "Twice.\n\n```pycon\n>>> twice(2)\n4\n```\n\n\nMore."
    )
    assert to_markdown("As here::\n\n    x = 1\n") == "As here:\n\n```python\nx = 1\n```\n"
    assert to_markdown("a * b is left alone: c") == "a * b is left alone: c"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_list_has_an_empty_line_before_it(page):
    # Without it Python-Markdown makes one paragraph of both; comments, which tables made by `make docs` stand in, end a block.
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"^(?!\s|- |\d+\. |<!--)(.+)\n(- .*)", text, re.MULTILINE)
    assert found == []
