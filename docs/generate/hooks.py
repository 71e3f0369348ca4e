"""Hooks of mkdocs: pages generated from code, recipes and runs, folders in the navigation, and formulas as MathML."""

import html
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import imports_figure
import method_pages
import package
import reference
import tutorials
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
CODE_IN_TABLE = re.compile(r"(<td[^>]*><code>)([^<]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_startup(**_: Any) -> None:
    """Link the package for mkdocstrings, which reads the folder when it is configured."""
    package.link_package(ROOT / "build" / "package")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Expand folders in the navigation."""
    docs = Path(config.docs_dir)
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} | set(generated_pages())
    listed = set(_listed(config.nav))
    config.nav = [entry for entry in _expand(config.nav, pages - listed)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, content in generated_pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Append recipes and measured rows to the page of a method, and draw the imports."""
    if "methods" in page.meta:
        markdown += method_pages.generated_sections(page.meta)
    if imports_figure.MARK in markdown:
        markdown = markdown.replace(imports_figure.MARK, imports_figure.draw_svg())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Convert formulas to MathML, which browsers draw without scripts; let settings in tables wrap at dots."""

    def to_mathml(match: re.Match[str]) -> str:
        text = html.unescape(match[3]).strip()
        if match[2] == "(":
            return _to_mathml(text, "inline")
        # Browsers do not break MathML, so the parts of a formula are formulas that wrap on narrow screens.
        parts = [_to_mathml(part, "block") for part in text.replace(r"\max_", r"\max\limits_").split(r"\qquad")]
        return f'<div class="formulas">{"".join(parts)}</div>'

    content = CODE_IN_TABLE.sub(lambda match: match[1] + re.sub(r"[._]", r"\g<0><wbr>", match[2]), content)
    return FORMULA.sub(to_mathml, content)


def _to_mathml(text: str, display: str) -> str:
    mathml = convert(text.strip(), display=display)
    return mathml.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')  # norms of equal height


def generated_pages() -> dict[str, str]:
    """Return the Markdown of all pages that have no file, by path in the site."""
    if not _pages:
        notes = (ROOT / "reports" / "NOTES.md").read_text().replace("../docs/results/measured.md", "measured.md")
        notes = re.sub(r"^  (?=\S)", "    ", notes, flags=re.MULTILINE)  # Python-Markdown nests by four spaces
        contributing = (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](../")
        _pages.update(
            {
                **reference.reference_pages(),
                **method_pages.index_page(),
                **method_pages.tables_page(),
                **tutorials.tutorial_pages(),
                "results/notes.md": notes,
                "about/contributing.md": contributing,
            }
        )
    return _pages


_pages: dict[str, str] = {}


def _listed(entry: Any) -> list[str]:
    if isinstance(entry, list):
        return [path for item in entry for path in _listed(item)]
    if isinstance(entry, dict):
        return [path for item in entry.values() for path in _listed(item)]
    return [entry]


def _expand(entries: list[Any], unlisted: set[str]) -> list[Any]:
    """Replace each `FOLDER/*` by the unlisted pages of the folder; sections without pages are left out."""
    expanded: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, content),) = entry.items()
            if isinstance(content, str) and not content.endswith("*"):
                expanded.append(entry)
            elif pages := _expand(content if isinstance(content, list) else [content], unlisted):
                expanded.append({title: pages})
        elif entry.endswith("/*"):
            expanded += sorted(
                path for path in unlisted if fnmatch(path, entry) and path.count("/") == entry.count("/")
            )
        else:
            expanded.append(entry)
    return expanded
