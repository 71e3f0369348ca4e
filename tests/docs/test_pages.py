"""Commands, YAML and Python of README and docs: parsed against the real parsers, and run where that is cheap."""

import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.main import get_command

from linflab.models.networks import NetworkConfig
from linflab.models.robustness.attacks import AttackMethod
from linflab.models.robustness.certification import Certifier
from linflab.models.robustness.objectives import ObjectiveConfig
from linflab.platform.cli.main import GUIDES, app
from linflab.platform.config.overrides import load_config
from linflab.platform.config.recipes import recipe_files
from linflab.platform.data.datasets import VALIDATION_FRACTION, load_dataset
from linflab.platform.data.info import DATASETS
from linflab.reports.comparison import TableDefinition
from linflab.search_spaces.space import SearchSpace, load_space
from tests.conftest import FinishedTraining, RunCli
from tests.docs.pages import PAGES, ROOT, Block, read_blocks, read_commands

COMMANDS = read_commands()
LINFLAB_COMMANDS = {f"{page}: {' '.join(words)}": words for page, words in COMMANDS if words[0] == "linflab"}
# Programs of other packages, which these tests do not parse.
OTHER_PROGRAMS = {
    "ray",
    "pip",
    "source",
    "export",
    "cat",
    "head",
    "sed",
    "ls",
    "tail",
    "python",
    "module",
    "srun",
    "cd",
}
CHEAP = ("recipes", "describe", "space", "schema")
USES_A_RUN = ("docs/how-to/python.md", "docs/how-to/report.md")  # tested with a trained network
USES_IMAGES = "docs/how-to/data.md"  # tested with image files


def parse_command(words: list[str]) -> dict[str, Any]:
    """Return the parameters of a command, parsed as on the command line."""
    command, rest = get_command(app), words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{' '.join(words)}: there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command.make_context(words[0], rest).params


@pytest.mark.parametrize("words", LINFLAB_COMMANDS.values(), ids=LINFLAB_COMMANDS)
def test_commands_of_linflab_are_valid(words: list[str]) -> None:
    params = parse_command(words)
    recipe = params.get("recipe")
    recipes = recipe if isinstance(recipe, list) else params.get("recipes") or [recipe]
    for name in recipes:
        if name in recipe_files():
            load_config(name, params.get("overrides") or [])
        else:
            assert name is None or name.endswith(".yaml") or name.isupper(), f"{name}: no recipe has this name"
    if (space := params.get("space")) and not space.endswith(".yaml") and not space.isupper():
        load_space(space)


def test_other_commands_are_known() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, words in COMMANDS:
        if words[0] == "make":
            assert words[1] in targets, f"{page}: {words}"
        elif words[0] != "linflab":
            assert Path(words[0]).name in OTHER_PROGRAMS, f"{page}: {words}"
        if words[0] == "python":
            assert (ROOT / words[1]).is_file() or words[1] == "-c" or words[1].startswith("-"), f"{page}: {words}"


@pytest.mark.integration
@pytest.mark.parametrize(
    "words",
    [
        words
        for name, words in LINFLAB_COMMANDS.items()
        if words[1] in CHEAP and name.startswith(("README", "docs/how-to"))
    ],
    ids=" ".join,
)
def test_cheap_commands_run(words: list[str], run_cli: RunCli) -> None:
    done = run_cli(*words[1:])
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("block", read_blocks("yaml"), ids=str)
def test_yaml_is_a_valid_table_space_or_recipe(block: Block, tmp_path: Path) -> None:
    tree = yaml.safe_load(block.text)
    if "columns" in tree:
        TableDefinition.model_validate(tree)
    elif "parameters" in tree:
        path = tmp_path / "space.yaml"
        path.write_text(block.text)
        assert isinstance(load_space(str(path)), SearchSpace)
    else:
        path = tmp_path / "recipe.yaml"
        path.write_text(block.text)
        load_config(str(path), [])


@pytest.mark.integration
def test_python_runs(tmp_path: Path) -> None:
    """All blocks run in one process, since imports take seconds; each has its own names."""
    others = (*USES_A_RUN, USES_IMAGES, "README.md")
    blocks = [(str(one), one.text) for one in read_blocks("python") if one.page not in others]
    assert len(blocks) >= 4
    code = f"for name, text in {blocks!r}:\n    exec(compile(text, name, 'exec'), {{'__name__': '__main__'}})\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
def test_python_that_loads_a_run_works(finished_training: FinishedTraining, tmp_path: Path) -> None:
    blocks = [one.text for one in read_blocks("python") if one.page == "docs/how-to/report.md"]
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("RUN_ID", finished_training.id).replace('"runs"', f'"{finished_training.storage}"')
    code = code.replace("sqlite:///runs", f"sqlite:///{finished_training.storage}")
    code += "\nimport torch\nimages = torch.rand(2, 1, 8, 8)\nassert network(images).shape == (2, 10)\n"
    code += "assert torch.allclose(graph(images), network(images), atol=1e-5)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_image_folders_become_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gray = {"ants": 50, "bees": 200}
    for split, name, number in product(("train", "test"), gray, range(4)):
        folder = tmp_path / "photos" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 80), (gray[name], number, 0)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "datasets"))
    (block,) = (one for one in read_blocks("python") if one.page == USES_IMAGES)
    for _ in range(2):  # it can be repeated, such as after more images are added
        exec(compile(block.text, str(block), "exec"), {})
    dataset = load_dataset("my_images")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (7, 1, 8)
    images, labels = dataset.test.batch(torch.arange(8))
    assert images.shape == (8, 3, 64, 64) and labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(images[:, 0, 0, 0] * 255, torch.tensor([50.0, 200.0])[labels])


def test_table_of_validation_images_agrees_with_the_code() -> None:
    rows = dict(re.findall(r"^\| (`.*`) \| [\d,]+ \| ([\d,]+) \|$", (ROOT / USES_IMAGES).read_text(), re.MULTILINE))
    sizes = {name: size for names, size in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert sizes == {name: f"{info.validation_size:,}" for name, info in DATASETS.items()}
    assert VALIDATION_FRACTION == 0.1


def test_every_kind_is_documented() -> None:
    text = "\n".join(
        (ROOT / "docs" / name).read_text()
        for name in ("how-to/networks-and-objectives.md", "concepts/attacks.md", "concepts/certifiers.md")
    )
    kinds = [
        *_own_kinds(NetworkConfig.kinds()),
        *_own_kinds(ObjectiveConfig.kinds()),
        *_own_kinds(AttackMethod.registry),
        *_own_kinds(Certifier.registry),
    ]
    assert len(kinds) > 30
    assert [kind for kind in kinds if f"`{kind}`" not in text] == []


def _own_kinds(registry: dict[str, type[Any]]) -> list[str]:
    """Return the kinds that linflab defines; other tests may register more."""
    return [kind for kind, one in registry.items() if one.__module__.startswith("linflab.")]


def test_every_method_of_a_recipe_has_a_page() -> None:
    documented = [
        name
        for page in sorted((ROOT / "docs" / "methods").glob("*.md"))
        for name in yaml.safe_load(page.read_text().split("---\n")[1])["methods"]
    ]
    used = {yaml.safe_load(path.read_text()).get("method") for path in recipe_files().values()}
    assert set(documented) == used and len(documented) == len(set(documented))


@pytest.mark.parametrize("path", [page for page in PAGES if page.parent == ROOT], ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_is_short_and_has_few_rows() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    start, end = lines.index("<!-- measured -->"), lines.index("<!-- end -->")
    assert 3 <= end - start - 3 <= 12


def test_help_of_every_command_names_its_page() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(GUIDES)
    for name, page in GUIDES.items():
        assert (ROOT / "docs" / page).is_file()
        assert commands[name].epilog.endswith(f"docs/{page}")
