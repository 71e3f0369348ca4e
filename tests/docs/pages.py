"""Code blocks of README, docs and tutorials, and the modules in docs/generate/."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
REDIRECTION = re.compile(r"\s2?[<>]+\s*\S+")
COMMENT = re.compile(r"(^|\s)#.*")


def load_generator(name: str) -> ModuleType:
    """Import a module of docs/generate/; these modules import each other by name, as hooks of mkdocs."""
    folder = str(ROOT / "docs" / "generate")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(name)


@dataclass(frozen=True)
class Block:
    """A code block of a page, with its number on the page."""

    page: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def read_blocks(*languages: str) -> list[Block]:
    """Return the blocks in these languages; indented blocks are shell commands."""
    blocks = []
    for path in PAGES:
        page, text = path.relative_to(ROOT).as_posix(), path.read_text()
        found = [(match[1], match[2]) for match in FENCE.finditer(text)]
        found += [("bash", block) for block in _indented_blocks(FENCE.sub("", text))]
        blocks += [Block(page, number, *one) for number, one in enumerate(found)]
    return [block for block in blocks if block.language in languages]


def read_commands() -> list[tuple[str, list[str]]]:
    """Return all commands of bash blocks and shell tutorials, with the page of each."""
    sources = [(block.page, block.text) for block in read_blocks("bash")]
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.sh")):
        sources.append(
            (
                path.relative_to(ROOT).as_posix(),
                re.sub(r"<<'YAML'\n.*?^YAML$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE),
            )
        )
    return [(page, words) for page, text in sources for words in _commands(text)]


def _commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        for command in re.split(r" \| | && ", REDIRECTION.sub("", COMMENT.sub("", line))):
            words = shlex.split(command)
            while words and re.fullmatch(r"exec|[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def _indented_blocks(text: str) -> list[str]:
    """Return paragraphs whose lines have four spaces, outside lists."""
    paragraphs = text.split("\n\n")
    return [
        "\n".join(line[4:] for line in paragraph.splitlines())
        for paragraph in paragraphs
        if all(line.startswith("    ") for line in paragraph.strip("\n").splitlines()) and paragraph.strip()
        and not paragraph.lstrip().startswith(("-", "|", "options:"))
    ]  # fmt: skip
