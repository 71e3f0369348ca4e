"""Quoted results: transcription of the published numbers, and marks of rows that were selected on test images."""

import io
from collections.abc import Iterator

import pandas as pd
import pytest
import yaml

from linflab.reports import literature
from linflab.reports.comparison import comparison_table, load_definition
from linflab.reports.literature import quoted_rows
from linflab.reports.papers import list_tables
from linflab.reports.rendering import print_table, to_csv, to_html, to_latex, to_markdown
from linflab.reports.tables import Table
from linflab.reports.terminal import PlainConsole
from linflab.search_spaces.strict_yaml import read_mapping
from tests.reports.runs import TABLE, make_run

# Clean/certified accuracies of each method: its own paper, tuned by CTBench, and by CTRAIN (most certified).
PUBLISHED = """
cifar10 2/255 IBP 66.84/52.85 67.49/55.99 69.18/55.99
cifar10 2/255 CROWN-IBP 71.52/53.97 67.60/57.11 76.33/60.94
cifar10 2/255 SABR 79.24/62.84 77.86/63.61 79.90/64.49
cifar10 2/255 MTL-IBP 80.11/63.24 78.82/64.41 79.10/64.61
cifar10 8/255 IBP 48.94/34.97 48.51/35.28 50.98/35.35
cifar10 8/255 CROWN-IBP - 48.25/32.59 49.73/34.78
cifar10 8/255 SABR 52.38/35.13 52.71/35.34 54.93/34.96
cifar10 8/255 MTL-IBP 53.35/35.44 54.28/35.41 51.87/35.74
tiny_imagenet 1/255 IBP 25.92/17.87 26.77/19.82 31.92/21.82
tiny_imagenet 1/255 CROWN-IBP 25.62/17.93 28.44/22.14 30.82/22.20
tiny_imagenet 1/255 SABR 28.85/20.46 30.58/20.96 40.61/28.86
tiny_imagenet 1/255 MTL-IBP 37.56/26.09 35.97/27.73 39.75/30.67
mnist 0.3 IBP 97.67/93.10 98.54/93.80 -
mnist 0.3 CROWN-IBP - 98.48/93.90 97.85/93.23
mnist 0.3 SABR -/93.40 98.66/93.68 -
mnist 0.3 MTL-IBP 98.80/93.62 98.74/93.90 98.67/92.21
"""
BY_SOURCE = ("own paper", "ctbench", "ctrain")


def test_tuned_results_are_quoted_number_by_number() -> None:
    quoted = {}
    for quotation in quoted_rows():
        row = quotation.row
        source = row.source if row.source in BY_SOURCE else "own paper"
        if row.source.startswith("zhang2021") or row.source == "ctrain_validation":
            continue
        key = (quotation.dataset, round(quotation.eps, 9), row.cell("Method").text.split(" (")[0], source)
        assert key not in quoted, key
        quoted[key] = "/".join(row.cell(column).text for column in ("Clean", "Certified"))
    for line in PUBLISHED.strip().splitlines():
        dataset, eps, method, *pairs = line.split()
        for source, pair in zip(BY_SOURCE, pairs, strict=True):
            key = (dataset, round(literature.parse_eps(eps), 9), method, source)
            assert quoted.get(key, "-") == pair, key


def test_rows_of_ctbench_ctrain_and_sort_net_are_selected_on_test() -> None:
    selections = {(quotation.row.source, quotation.row.selected_on) for quotation in quoted_rows()}
    by_source = dict(selections)
    assert len(selections) == len(by_source)  # each source has one rule
    assert {source for source, selection in by_source.items() if selection == "test"} == {
        "sortnet_logs",
        "ctbench",
        "ctrain",
    }
    assert {source for source, selection in by_source.items() if selection == "validation"} == {"ctrain_validation"}


@pytest.fixture
def changed_literature(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """Content of literature.yaml that a test may change."""
    content = yaml.safe_load(yaml.safe_dump(literature._content()))
    monkeypatch.setattr(literature, "_content", lambda: content)
    quoted_rows.cache_clear()
    yield content
    quoted_rows.cache_clear()


@pytest.mark.parametrize("selected_on", [None, "train"])
def test_rows_without_valid_selection_are_rejected(changed_literature: dict, selected_on: str | None) -> None:
    changed_literature["rows"][0]["selected_on"] = selected_on
    with pytest.raises(ValueError, match=f"selected_on={selected_on}"):
        quoted_rows()


def _print(table: Table, encoding: str = "utf-8") -> str:
    out = io.BytesIO()
    with io.TextIOWrapper(out, encoding=encoding, write_through=True) as file:
        print_table(table, PlainConsole(file, width=100))
        return out.getvalue().decode(encoding)


def test_every_format_marks_rows_selected_on_test() -> None:
    group = {"dataset": "cifar10", "eps": 8 / 255}
    definition = TABLE.model_validate(
        {"title": "t", "groups": [group], "quoted": ["ctbench", "depalma2024_table1", "ctrain_validation"]}
    )
    run = make_run(1, 0.5, 0.4, dataset="cifar10", eps=str(8 / 255))
    table = comparison_table(definition, pd.DataFrame([run]))
    (note,) = [note for note in table.notes if note.startswith("†")]
    assert "test images" in note
    marks = {
        to_markdown(table): ("MTL-IBP (CTBench) <sup>†</sup>", f"- {note}", "<sup>†</sup>"),
        to_html(table): ("MTL-IBP (CTBench)<sup>†</sup>", f"<li>{note}", "<sup>†</sup>"),
        to_latex(table): (r"MTL-IBP (CTBench)$^{\dagger}$", note.replace("†", r"$\dagger$"), r"$^{\dagger}$"),
        _print(table): ("MTL-IBP (CTBench) [†]", "†: ", "[†]"),
        _print(table, "ascii"): ("MTL-IBP (CTBench) [#]", "#: ", "[#]"),
    }
    for text, (cell, text_note, mark) in marks.items():
        assert cell in text and text_note in text, text
        assert text.count(mark) == 4  # the rows of CTBench, but neither the other quoted ones nor the measured one
    rows = pd.read_csv(io.StringIO(to_csv(table))).set_index("Method")["Selected on"]
    assert rows["MTL-IBP (CTBench)"] == "test" and rows["MTL-IBP (CTRAIN, validation)"] == "validation"
    assert rows["CC-IBP (De Palma et al., 2024)"] == "unknown" and rows["l_inf-dist Net"] == "validation"


def test_published_tables_fit_a_terminal_and_a_page() -> None:
    for name in list_tables():
        table = comparison_table(load_definition(name, read_mapping), pd.DataFrame())
        assert "more rows" not in to_latex(table) + _print(table), name
