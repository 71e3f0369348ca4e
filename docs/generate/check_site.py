"""Checks of the built site: links lead somewhere, nothing is loaded from elsewhere, search finds key terms."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADING = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}
LOADED_RELATIONS = {"stylesheet", "icon", "preload", "modulepreload"}
TERMS = {
    "certified radius": "concepts/linf-distance-nets.html",
    "p schedule": "concepts/p-schedule.html",
    "slurm": "how-to/slurm.html",
}


class PageParser(HTMLParser):
    """Parser that collects the anchors, links and loaded resources of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what one tag defines or refers to."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "link":
            is_loaded = bool(LOADED_RELATIONS & set(values.get("rel", "").split()))
            (self.resources if is_loaded else self.links).append(values.get("href", ""))
        elif tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.resources += [values[name] for name in values if (tag, name) in LOADING]


def parse_page(path: Path) -> PageParser:
    """Return the parsed page."""
    parser = PageParser()
    parser.feed(path.read_text())
    return parser


def find_problems(site: Path) -> list[str]:
    """Return all problems of a site, one line each."""
    pages = {path: parse_page(path) for path in sorted(site.rglob("*.html"))}
    problems = [] if len(pages) > 1 else [f"{site}: has no pages; run `make docs`"]
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute, for any place
            continue
        name = path.relative_to(site)
        for address in page.resources:
            if urlsplit(address).netloc:
                problems.append(f"{name}: loads {address}")
        for address in [*page.links, *page.resources]:
            problems += [f"{name}: {problem}" for problem in _check_link(path, address, pages)]
    for path in site.rglob("*.css"):
        problems += [
            f"{path.relative_to(site)}: loads {address}"
            for address in re.findall(r"url\(\s*[\"']?((?:https?:)?//[^\"')]+)|@import\s+[\"']((?:https?:)?//[^\"']+)",
                                      path.read_text())
        ]  # fmt: skip
    return problems + _check_search(site)


def _check_link(path: Path, address: str, pages: dict[Path, PageParser]) -> list[str]:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return []
    file, anchor = urldefrag(address)
    target = (path.parent / unquote(file)).resolve() if file else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return [f"link to {address}: not found"]
    if anchor and target in pages and unquote(anchor) not in pages[target].anchors:
        return [f"link to {address}: no such anchor"]
    return []


def _check_search(site: Path) -> list[str]:
    documents = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    problems = []
    for term, expected in TERMS.items():
        hits = {urldefrag(one["location"])[0] for one in documents if term in f"{one['title']} {one['text']}".lower()}
        if expected not in hits:
            problems.append(f"search: {term!r} does not find {expected}")
    return problems


if __name__ == "__main__":
    found = find_problems(Path(sys.argv[1]).resolve())
    print("\n".join(found) or f"{sys.argv[1]}: all links lead somewhere, and nothing is loaded from elsewhere")
    sys.exit(bool(found))
