"""Tutorials: scripts that run as they are, shown as pages with their recorded output.

A script is a sequence of cells that start with `# %%`. Comments at the start of a cell are the text of the page, the
rest is code. `python docs/generate/tutorials.py NAME` runs a script and records the output of each cell in
docs/tutorials/recorded/NAME.json. Scripts are Python (.py) or shell (.sh).
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "tutorials"
LANGUAGES = {".py": "python", ".sh": "bash"}


@dataclass(frozen=True)
class Cell:
    """One cell of a script: text in Markdown, and code."""

    text: str
    code: str


def script_files() -> list[Path]:
    """Return all tutorial scripts."""
    return sorted(path for path in FOLDER.iterdir() if path.suffix in LANGUAGES)


def read_cells(path: Path) -> list[Cell]:
    """Return the cells of a script."""
    cells = []
    for part in path.read_text().split("# %%\n")[1:]:
        lines = part.splitlines()
        count = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count])
        cells.append(Cell(text, "\n".join(lines[count:]).strip()))
    return cells


def run_script(path: Path, folder: Path) -> list[str]:
    """Run a script, cell by cell, in a folder, and return the output of each cell.

    Raises:
        subprocess.CalledProcessError: If a cell of a shell script fails; errors of Python scripts are their own.
    """
    run = _run_python if path.suffix == ".py" else _run_shell
    with contextlib.chdir(folder):
        return run([cell.code for cell in read_cells(path)])


def tutorial_pages() -> dict[str, str]:
    """Return the Markdown of all tutorials, by path in the site."""
    pages, entries = {}, []
    for path in script_files():
        cells, language = read_cells(path), LANGUAGES[path.suffix]
        outputs = json.loads((FOLDER / "recorded" / f"{path.stem}.json").read_text())
        blocks = []
        for cell, output in zip(cells, outputs, strict=True):
            blocks.append(cell.text)
            blocks += [f"```{language}\n{cell.code}\n```"] if cell.code else []
            blocks += [f'```text title="Output"\n{output.rstrip()}\n```'] if output.strip() else []
        blocks.append(f"The script of this page is `docs/tutorials/{path.name}`; the tests run it.")
        pages[f"tutorials/{path.stem}.md"] = "\n\n".join(blocks) + "\n"
        title, _, summary = cells[0].text.partition("\n")
        entries.append(f"- [{title.removeprefix('# ')}]({path.stem}.md): {summary.strip().split(chr(10) * 2)[0]}")
    index = "# Tutorials\n\nEach tutorial is a script that runs on a laptop without a GPU.\n\n" + "\n".join(entries)
    return {**pages, "tutorials/index.md": index + "\n"}


def _environment() -> dict[str, str]:
    """Return the environment of a script, with linflab's command and 100 columns."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}


def _run_python(codes: list[str]) -> list[str]:
    names: dict[str, object] = {"__name__": "__main__"}
    outputs = []
    before = dict(os.environ)
    os.environ.update(_environment())
    for code in codes:
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            exec(compile(code, "<tutorial>", "exec"), names)
        outputs.append(stdout.getvalue())
    os.environ.clear()  # scripts may set variables
    os.environ.update(before)
    return outputs


def _run_shell(codes: list[str]) -> list[str]:
    return [
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], env=_environment(), check=True, text=True, stdout=subprocess.PIPE
        ).stdout
        for code in codes
    ]


if __name__ == "__main__":
    for stem in sys.argv[1:]:
        (script,) = FOLDER.glob(f"{stem}.*")
        with tempfile.TemporaryDirectory() as temporary:
            recorded = [text.replace(temporary, ".") for text in run_script(script, Path(temporary))]
        (FOLDER / "recorded").mkdir(exist_ok=True)
        (FOLDER / "recorded" / f"{stem}.json").write_text(json.dumps(recorded, indent=1) + "\n")
