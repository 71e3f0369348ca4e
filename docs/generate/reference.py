"""Reference pages: the command line, settings, recipes, search spaces and records, written from the code."""

import html
import io
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from settings_reference import settings_page

from linflab.platform.cli.main import app
from linflab.platform.config.recipes import recipe_files
from linflab.reports import schema
from linflab.reports.literature import dataset_title
from linflab.search_spaces.space import load_space, space_names

GENERATED = "\n<!-- Generated from the code; see docs/generate/. -->\n"


def reference_pages() -> dict[str, str]:
    """Return the Markdown of all generated reference pages, by path in the site."""
    pages = {
        "reference/cli.md": cli_page(),
        "reference/settings.md": settings_page(),
        "reference/search-spaces.md": spaces_page(),
        "reference/records.md": records_page(),
        **recipe_pages(),
    }
    return {path: text + GENERATED for path, text in pages.items()}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; cells may contain Markdown, and bars in them are escaped."""
    lines = [columns, [":--"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def cli_page() -> str:
    """Return the page of all commands with their arguments and options."""
    from typer.main import get_command

    text = (
        "# Command line\n\nThe exit status is 0 after success, 1 if training failed, 2 if the input is invalid and "
        "nothing was started, and 130 after an interruption. `linflab COMMAND --help` shows the same options.\n"
    )
    for words, command in iterate_commands(get_command(app)):
        name = " ".join(("linflab", *words))
        arguments = [param for param in command.params if not _is_option(param)]
        options = [param for param in command.params if _is_option(param)]
        usage = " ".join([name, *(_metavar(param) for param in arguments), *(["[OPTIONS]"] if options else [])])
        text += f"\n## {name}\n\n{_escape(command.help or '')}\n\n```text\n{usage}\n```\n\n"
        if command.params:
            rows = [
                (f"`{_spelling(param)}`", _escape(param.help or ""), _default(param))
                for param in (*arguments, *options)
            ]
            text += markdown_table(("Argument or option", "Meaning", "Default"), rows)
    return text


def iterate_commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all commands of a Typer application with the words that call them, groups with options first."""
    for name, command in group.commands.items():
        if not hasattr(command, "commands"):
            yield (*words, name), command
            continue
        if command.params:
            yield (*words, name), command
        yield from iterate_commands(command, (*words, name))


def _is_option(param: Any) -> bool:
    return param.opts[0].startswith("-")


def _metavar(param: Any) -> str:
    name = param.metavar or param.name.upper()
    name = f"{name}..." if param.nargs == -1 else name
    return name if param.required else f"[{name}]"


def _spelling(param: Any) -> str:
    if not _is_option(param):
        return _metavar(param).strip("[]")
    names = ", ".join((*param.opts, *param.secondary_opts))
    return names if param.is_flag else f"{names} {param.metavar or param.type_descriptor.annotation.__name__.upper()}"


def _default(param: Any) -> str:
    values = [] if param.default in (None, "", False, [], ()) or callable(param.default) else [f"`{param.default}`"]
    values += [f"`${param.envvar}`"] if getattr(param, "envvar", None) else []
    return "required" if param.required else ", ".join(values)


def recipe_pages() -> dict[str, str]:
    """Return one page for each dataset, with the files of its recipes."""
    pages: dict[str, str] = {}
    for folder in sorted({path.parent for path in recipe_files().values()}):
        files = [path for path in recipe_files().values() if path.parent == folder]
        trees = {path: yaml.safe_load(path.read_text()) for path in files}
        text = f"# Recipes for {dataset_title(folder.name)}\n\n"
        rows = [
            (f"[{path.stem}](#{_anchor(path.stem)})", tree.get("method", ""), f"{tree['eps']}", _claim(path))
            for path, tree in trees.items()
        ]
        text += markdown_table(("Recipe", "Method", "eps", "State"), rows)
        for path in files:
            text += f"\n## {path.stem} {{ #{_anchor(path.stem)} }}\n\n```yaml\n{path.read_text()}```\n"
        pages[f"reference/recipes/{folder.name}.md"] = text
    return pages


def _claim(path: Path) -> str:
    """Return whether the header of a recipe reports a result, or that it has not been run."""
    header = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    return "not run here" if "Not run here" in header else "run here" if "%" in header else ""


def _anchor(text: str) -> str:
    return text.replace(".", "-")


def spaces_page() -> str:
    """Return the page of the shipped search spaces."""
    text = "# Search spaces\n\nThe file format is described in [the guide](../how-to/search-spaces.md).\n"
    for name in space_names():
        space = load_space(name)
        rows = [(f"`{path}`", _escape(str(values))) for path, values in space.parameters.items()]
        text += f"\n## {name}\n\n{_escape(space.description)}\n\n" + markdown_table(("Setting", "Values"), rows)
    return text


def records_page() -> str:
    """Return the page of everything that a run logs, from the names and comments of `reports/schema.py`."""
    text = (
        "# Schema of records\n\nEvery run is an MLflow run with these tags, metrics and artifacts. Its parameters are "
        "the settings of the config by dotted path. Accuracies are fractions in [0, 1].\n"
    )
    names = {name: value for name, value in vars(schema).items() if name.isupper() and isinstance(value, str)}
    for title, entries in _schema_sections():
        rows = [(f"`{names[name]}`", _escape(comment)) for name, comment in entries if name in names]
        if rows:
            text += f"\n## {title}\n\n" + markdown_table(("Name", "Meaning"), rows)
    return text + (
        "\n## Exported runs\n\n`linflab runs export` writes one JSON object per line. The first line is "
        '`{"format": "linflab runs", "version": 2}`. Each further line is a run with the keys `run_id`, `experiment`, '
        "`status`, `start_time`, `end_time`, `tags`, `params` and `metrics`.\n"
    )


def _schema_sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the sections of `reports/schema.py`: title, and names with their trailing comments."""
    source = Path(str(schema.__file__)).read_text()
    comments = {
        token.start[0]: token.string.removeprefix("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    title, entries = "", list[tuple[str, str]]()
    for number, line in enumerate(source.splitlines(), 1):
        if line.startswith("# "):
            if entries:
                yield title, entries
            title, entries = line.removeprefix("# ").split(" (")[0].rstrip("."), []
        elif line[:1].isupper() and " = " in line:
            entries.append((line.split(" = ")[0], comments.get(number, "")))
    yield title, entries


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace("*", "\\*").replace("_", "\\_") if "`" not in text else text
