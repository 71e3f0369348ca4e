"""Modules in docs/generate/: the reference pages, formulas, import picture and the checks of the built site."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.reports import schema
from tests.docs.pages import ROOT, load_generator
from tests.test_structure import BASE, list_allowed_imports

check_site, hooks, imports_figure = map(load_generator, ("check_site", "hooks", "imports_figure"))
readme, reference, settings_reference = map(load_generator, ("readme", "reference", "settings_reference"))


@pytest.mark.parametrize(
    ("page", "rows"), [("README.md", readme.readme_rows), ("docs/how-to/export.md", readme.pretrained_rows)]
)
def test_pages_show_the_measured_rows(page: str, rows: Callable[[], str]) -> None:
    """`make readme` writes them."""
    shown = (ROOT / page).read_text().split(readme.START)[1].split(readme.END)[0]
    assert shown == rows()


def test_every_setting_is_in_the_reference() -> None:
    page = settings_reference.settings_page()
    for recipe in ("digits_eps0.1_linf_dist_net", "digits_eps0.1_taps", "cifar10_eps2_255_sort_net_hybrid"):
        for path in load_config(recipe, []).to_flat_dict():
            assert f"`{path.replace('backbone.', '')}`" in page or path.endswith(".kind"), path
    assert next(iter(ExperimentConfig.model_fields)) == "method" and "`seed`" in page


def test_every_command_and_record_is_in_the_reference() -> None:
    page = reference.cli_page()
    for command in ("train", "sweep", "report table1", "runs export", "data prepare"):
        assert f"\n## linflab {command}\n" in page
    assert "`--budget TEXT`" in page or "`--budget STR`" in page
    records = reference.records_page()
    names = [value for name, value in vars(schema).items() if name.isupper() and isinstance(value, str)]
    assert [name for name in names if f"`{name}`" not in records] == []


def test_picture_of_imports_agrees_with_the_layers() -> None:
    imports = imports_figure.read_imports()
    assert set(imports_figure.BASE) == BASE
    for part, targets in imports.items():
        assert targets - {"models", "search_spaces", "reports"} <= list_allowed_imports(part)
    order = {part: level for level, row in enumerate(imports_figure.layers(imports)) for part in row}
    for part, targets in imports.items():
        for target in targets & set(order):
            assert part in BASE or order[part] < order[target]


def test_formulas_become_mathml() -> None:
    page = hooks.on_page_content(r'<p><span class="arithmatex">\(a &lt; b_1\)</span></p>')
    assert "<math" in page and "&#x0003C;" in page and "arithmatex" not in page


def test_parts_of_a_formula_become_formulas_that_wrap() -> None:
    page = hooks.on_page_content(r'<div class="arithmatex">\[a = b, \qquad \max_x c\]</div>')
    assert page.startswith('<div class="formulas">') and page.count("<math") == page.count('display="block"') == 2


def test_settings_in_tables_wrap_at_dots() -> None:
    row = '<td style="text-align: left;"><code>model.batch_norm</code></td><td>a.b</td>'
    assert hooks.on_page_content(row) == row.replace("model.batch_norm", "model.<wbr>batch_<wbr>norm")


def test_folders_in_the_navigation_list_other_pages() -> None:
    nav = [{"One": ["a/x.md", "a/*"]}, {"None": "b/*"}]
    assert hooks._expand(nav, {"a/y.md", "a/z.md", "a/deep/w.md"}) == [{"One": ["a/x.md", "a/y.md", "a/z.md"]}]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="b.html">', None),
        ('<a href="b.html#there">', None),
        ('<a href="c.html">', "not found"),
        ('<a href="b.html#nowhere">', "no such anchor"),
        ('<script src="https://example.org/x.js"></script>', "loads"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "loads"),
        ('<a href="https://example.org">', None),
    ],
)
def test_check_of_the_site_finds_problems(tmp_path: Path, body: str, problem: str | None) -> None:
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<p id="there">')
    (tmp_path / "search").mkdir()
    documents = [{"location": page, "title": term, "text": ""} for term, page in check_site.TERMS.items()]
    (tmp_path / "search" / "search_index.json").write_text(json.dumps({"docs": documents}))
    problems = check_site.find_problems(tmp_path)
    assert len(problems) == (problem is not None) and all(str(problem) in one for one in problems)
    (tmp_path / "search" / "search_index.json").write_text(json.dumps({"docs": documents[1:]}))
    assert len(check_site.find_problems(tmp_path)) == len(problems) + 1
