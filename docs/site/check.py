"""Checks the built site: links and anchors resolve, no page loads anything from elsewhere, every public name is there once.

python docs/site/check.py runs/site
"""

import re
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

ROOMS = (
    *("polar", "codec", "transport", "stages", "optim", "recipes"),
    *("tasks", "train", "integrations", "compare", "spectra", "pages", "lab"),
)
# Attributes that make a browser load something when the page is opened; a plain link does not.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
LOADING_RELATIONS = {"stylesheet", "icon", "preload", "preconnect", "prefetch", "modulepreload"}
REMOTE = re.compile(r"^(https?:)?//")
REMOTE_IN_STYLE = re.compile(r"(?:url\(|@import\s)\s*['\"]?((?:https?:)?//[^'\")]+)")


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors and headings that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.headings: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the links, loads and anchors of one tag."""
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.anchors.add(found["id"])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(found.get("id", ""))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in LOADED and LOADED[tag] in found:
            self.loads.append(found[LOADED[tag]])
        if tag == "link" and LOADING_RELATIONS & set(found.get("rel", "").split()):
            self.loads.append(found["href"])
        if "mermaid" in found.get("class", "").split():
            self.loads.append("//unpkg.com, which the theme takes diagrams of class mermaid from")


def broken_links(pages: dict[Path, Page]) -> list[str]:
    """Links and loads that lead to no file, or to no anchor of a page."""
    wrong = []
    for path, page in pages.items():
        # The page for addresses that do not exist is served from anywhere, so its links start at the root.
        for link in () if path.name == "404.html" else (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                wrong.append(f"{path}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"{path}: {link} names an anchor that is not there")
    return wrong


def remote_loads(site: Path, pages: dict[Path, Page]) -> list[str]:
    """What pages and styles load from other machines."""
    wrong = [
        f"{path}: loads {load}" for path, page in pages.items() for load in page.loads if REMOTE.match(load)
    ]
    for style in site.rglob("*.css"):
        wrong += [f"{style}: loads {load}" for load in REMOTE_IN_STYLE.findall(style.read_text())]
    return wrong


def public_names(module: ModuleType) -> list[str]:
    """The names that a room's module declares in ``__all__``, or, without that, gives of its own."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = f"{module.__name__}."
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and f"{getattr(value, '__module__', '')}.".startswith(own)
    ]


def misplaced_names(site: Path, pages: dict[Path, Page]) -> list[str]:
    """Public names of the rooms that have no heading in the API pages and the list of recipes, or more than one."""
    wrong = []
    # The list of recipes has them and their settings, under anchors in small letters.
    recipes = Counter(pages[site / "recipes.html"].headings)
    for room in ROOMS:
        headings = pages[site / "api" / f"{room}.html"].headings
        # A heading is muonwire.room.name; or muonwire.room.file.name, where a file of the room has the name too.
        named = Counter(
            h.rpartition(".")[2] for h in headings if re.fullmatch(rf"muonwire\.{room}\.([a-z_]+\.)?\w+", h)
        )
        named.update(word.upper() for h in headings if "." not in h for word in h.split("-"))
        module = import_module(f"muonwire.{room}")
        for name in public_names(module):
            times = named[name] + (recipes[name.lower()] if room == "recipes" else 0)
            submodule = f"muonwire{room}{name}" in headings
            if times != 1 and not submodule:
                wrong.append(f"muonwire.{room}.{name} is documented {times} times")
    return wrong


def main() -> int:
    """Check the site in the folder that the command line names; returns the exit code."""
    site = Path(sys.argv[1]).resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    wrong = [*broken_links(pages), *remote_loads(site, pages), *misplaced_names(site, pages)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(pages)} pages: {len(wrong)} mistakes" if wrong else f"{len(pages)} pages: no mistake")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
