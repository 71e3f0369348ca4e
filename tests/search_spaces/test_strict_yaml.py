"""YAML of users: valid input that is harmful or never intended is rejected at once, with its key and line."""

import os
import time
from pathlib import Path

import pytest
import yaml

from linflab.search_spaces import strict_yaml
from tests.conftest import RECIPE, RunCli, assert_rejected


def nest_aliases(levels: int, leaf: str = "[x, x, x, x, x, x, x, x, x]") -> str:
    """Return lists of lists of aliases, which expand to 9 to the power of `levels` elements."""
    lists = [f"&l0 {leaf}"] + [f"&l{k} [{', '.join([f'*l{k - 1}'] * 9)}]" for k in range(1, levels)]
    return f"[{', '.join(lists)}]"


def nest_mappings(levels: int) -> str:
    lines = ["l0: &l0 {a: 1, b: 1, c: 1, d: 1}"]
    lines += [f"l{k}: &l{k} {{{', '.join(f'{key}: *l{k - 1}' for key in 'abcd')}}}" for k in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a: 1\na: 2", ("a", "line 2")),
        ("a:\n  b: {c: 1, d: 2, c: 1}", ("a.b.c", "line 2")),
        ("a: [{b: 1}, {b: 1, b: 2}]", ("a.1.b",)),
        ("a: 2020-02-03", ("a", "line 1")),
        ("a: {b: [1, 2020-02-31]}", ("a.b.1",)),
        ("a: 1:30", ("a",)),
        (f"a: {'9' * 5000}", ("a",)),
        ("a: !!binary aGk=", ("a", "binary")),
        ("a: !!python/name:os.system", ("a", "python")),
        ("a: &a [1, *a]", ("a.1",)),
        ("a: *b", ("line 1", "b")),
        ("? [a, b]\n: 1", ("key",)),
        ("a: {b: {1: 2}}", ("a.b.1",)),
        ('a: "\\ud800"', ("a",)),
        ("a: " + "[" * 5000 + "]" * 5000, ("a.0",)),
        ("\n".join(["l0: &l0 {a: 1}", *(f"l{k}: &l{k} {{a: *l{k - 1}}}" for k in range(1, 300))]), ("line",)),
        (f"a: {nest_aliases(9)}", ("a.",)),
        (f"{nest_mappings(14)}\n", ("line",)),
        ("a: [" + "1, " * 30_000 + "]", ("a.",)),
        ("a: {b: !!bool maybe}", ("a.b", "line 1")),
        ("a: !!bool ''", ("a",)),
        ("a: !!int ''", ("a",)),
        ("a: !!int '-'", ("a",)),
        ("a: !!int _", ("a",)),
        ("a: !!int text", ("a",)),
        ("a: !!float ''", ("a",)),
        ("a: !!float '+'", ("a",)),
        ("!!int '': 1", ("line 1",)),
        ("a: 1\n---\nb: 2", ("line 2",)),
        ("a: [1", ("line 1",)),
        ("- 1", ("list",)),
        ("text", ("str",)),
        ("", ("nothing",)),
    ],
)
def test_harmful_yaml_is_rejected_in_one_line(text: str, names: tuple[str, ...]) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^.*$") as caught:
        strict_yaml.parse_mapping(text)
    assert all(name in str(caught.value) for name in names) and len(str(caught.value)) < 200
    assert time.monotonic() - start < 60


def test_ordinary_yaml_is_read_as_by_pyyaml() -> None:
    text = """
        base: &base {x: 1, y: 2.5, on: [yes, null, ~]}
        other: {<<: *base, y: 3}      # overrides what is merged
        twice: [*base, *base]
        text: "2020-02-03, 1:30"
    """
    assert strict_yaml.parse_mapping(text.replace("on:", '"on":')) == yaml.safe_load(text.replace("on:", '"on":'))
    for path in [*Path("search_spaces").glob("*.yaml"), *Path("reports").rglob("*.yaml"), *Path().glob("*.yaml")]:
        assert strict_yaml.read_mapping(path) == yaml.safe_load(path.read_text())


def test_files_that_are_no_text_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_text("# " + "x" * strict_yaml.MAX_BYTES)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe", "large", "latin", "folder"):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            strict_yaml.read_mapping(tmp_path / f"{name}.yaml")
    with pytest.raises(FileNotFoundError):
        strict_yaml.read_mapping(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "bad", [f"method: {nest_aliases(9)}", nest_mappings(14), "method: a\nmethod: b", "- 1", "pipe"]
)
def test_recipe_space_and_table_reject_harmful_yaml(bad: str, run_cli: RunCli, tmp_path: Path) -> None:
    """Every command that reads a user's file soon exits with status 2 and one line that names the file."""
    file = tmp_path / "mine.yaml"
    if bad == "pipe":
        os.mkfifo(file)
    else:
        file.write_text(bad)
    start = time.monotonic()
    for command in (
        ["train", str(file)],
        ["sweep", str(file), "demo"],
        ["sweep", RECIPE, str(file)],
        ["space", "show", str(file)],
        ["describe", str(file)],
        ["report", "table", str(file)],
    ):
        done = run_cli(*command, *(["--storage", str(tmp_path / "runs")] if command[0] in ("train", "sweep") else []))
        assert_rejected(done, str(file))
        assert len(done.stderr) < 500
    assert time.monotonic() - start < 120 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("override", ["model={width: 8, width: 16}", "model=" + "[" * 5000, f"model={nest_aliases(9)}"])
def test_override_rejects_harmful_yaml(override: str, run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("train", RECIPE, override, "--storage", str(tmp_path))
    assert_rejected(done, "model")
    assert len(done.stderr) < 500


def test_files_of_linflab_are_limited_only_in_aliases(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    content = {"points": [{"setting": k, "other": "x" * 100} for k in range(2500)]}
    file.write_text(yaml.safe_dump(content))
    assert strict_yaml.read_mapping(file, limited=False) == content
    with pytest.raises(ValueError, match="KiB"):
        strict_yaml.read_mapping(file)
    file.write_text(f"a: {nest_aliases(9)}")
    with pytest.raises(ValueError, match=r"a\."):
        strict_yaml.read_mapping(file, limited=False)
