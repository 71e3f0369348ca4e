"""Comparison tables: quoted rows as printed, measured rows chosen on validation, and what is said of both."""

import csv
import html
import io
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from linflab.reports import schema
from linflab.reports.comparison import Measured, TableDefinition, comparison_table, load_definition, table_of
from linflab.reports.papers import table_names
from linflab.reports.rendering import print_table, to_csv, to_html, to_latex, to_markdown
from linflab.reports.tables import Table, eps_text

# The tables of Zhang et al., ICML 2021, typed in from the paper: what a table must show, cell by cell.
PAPER = {
    "table1": """
MNIST (eps = 0.3)
Group Sort (Anil et al., 2019)|2.9M|97.0|34.0|2.0
COLT (Balunovic & Vechev, 2020)|4.9M|97.3|-|85.7
IBP (Gowal et al., 2018)|114M|97.88|93.22|91.79
CROWN-IBP (Zhang et al., 2020b)|114M|98.18|93.95|92.98
l_inf-dist Net|82.7M|98.54|94.71|92.64
l_inf-dist Net+MLP|85.3M|98.56|95.28|93.09
Fashion MNIST (eps = 0.1)
CAP (Wong & Kolter, 2018)|0.41M|78.27|68.37|65.47
IBP (Gowal et al., 2018)|114M|84.12|80.58|77.67
CROWN-IBP (Zhang et al., 2020b)|114M|84.31|80.22|78.01
l_inf-dist Net|82.7M|87.91|79.64|77.48
l_inf-dist Net+MLP|85.3M|87.91|80.89|79.23
CIFAR-10 (eps = 8/255)
PVT (Dvijotham et al., 2018a)|2.4M|48.64|32.72|26.67
DiffAI (Mirman et al., 2019)|96.3M|40.2|-|23.2
COLT (Balunovic & Vechev, 2020)|6.9M|51.7|-|27.5
IBP (Gowal et al., 2018)|151M|50.99|31.27|29.19
CROWN-IBP (Zhang et al., 2020b)|151M|45.98|34.58|33.06
CROWN-IBP (loss fusion) (Xu et al., 2020a)|151M|46.29|35.69|33.38
l_inf-dist Net|121M|56.80|37.46|33.30
l_inf-dist Net+MLP|123M|50.80|37.06|35.42
""",
    "table2": """
TinyImageNet (eps = 1/255)
CROWN-IBP (loss fusion) (Xu et al., 2020a)|CNN7+BN|458M|21.58|19.04|12.69
CROWN-IBP (loss fusion) (Xu et al., 2020a)|ResNeXt|64M|21.42|20.20|13.05
CROWN-IBP (loss fusion) (Xu et al., 2020a)|DenseNet|575M|22.04|19.48|14.56
CROWN-IBP (loss fusion) (Xu et al., 2020a)|WideResNet|5.22G|27.86|20.52|15.86
l_inf-dist net|l_inf-dist Net+MLP|156M|21.82|18.09|16.31
""",
    "table4": """
CIFAR-10 (eps = 8/255)
IBP|17.4
CROWN-IBP|112.4
CROWN-IBP (loss fusion)|43.3
l_inf-dist Net|19.7
l_inf-dist Net+MLP|19.7
""",
}


@pytest.mark.parametrize("name", list(PAPER))
def test_the_paper_is_quoted_cell_by_cell(name: str) -> None:
    table = comparison_table(load_definition(name), pd.DataFrame())
    shown = []
    for row in table.rows:
        if row.group not in shown:
            shown.append(row.group)
        shown.append("|".join(row.cell(column).text for column in table.columns))
    assert shown == PAPER[name].strip().splitlines()
    assert any("arxiv.org/abs/2102.05363" in note for note in table.notes)


def test_every_shipped_table_comes_without_any_record() -> None:
    assert set(table_names()) == {"measured", "table1", "table2", "table4", "successors"}
    for name in table_names():
        table = comparison_table(load_definition(name), pd.DataFrame())
        assert table.rows and all(row.source for row in table.rows)
        notes = " ".join(table.notes)
        assert ("second hand" in notes) == (name in ("successors", "measured"))
        assert "no run with test scores is on record" in notes


def run(number: int, validation: float | None, certified: float | None, **other: object) -> dict[str, object]:
    """A run as `read_runs` has it."""
    return {
        "run_id": f"{number:032x}", "status": "FINISHED", "started": number, "dataset": "fashion_mnist", "eps": "0.1",
        "method": "l_inf-dist Net", "seed": "0", "model.width": "64", "training.include_validation": "False",
        schema.EPOCHS: "25", schema.METHOD: "l_inf-dist Net", schema.COMMAND: f"linflab train r seed={number}",
        schema.HARDWARE: "2 CPU cores", schema.CERTIFIER: "lipschitz", schema.ATTACK: "PGD (20 steps)",
        schema.BEST_VALIDATION_CERTIFIED: validation, schema.TEST_CERTIFIED: certified, schema.TEST_CLEAN: 0.85,
        schema.TEST_ROBUST: 0.79, schema.TEST_BROKEN: 0, schema.FLOPS: 1.2e6, schema.TRAIN_SECONDS: 3600.0,
        schema.TEST_CERTIFIED_EXACT: None, "compute.workers": "1", "compute.cpus_per_worker": "2", **other,
    }  # fmt: skip


TABLE = TableDefinition.model_validate(
    {"title": "t", "groups": [{"dataset": "fashion_mnist", "eps": 0.1}], "quoted": ["zhang2021_table1"]}
)


def measured(table: Table) -> list:
    return [row for row in table.rows if row.kind == "measured"]


def test_rows_are_chosen_on_validation_with_mean_and_deviation_over_seeds() -> None:
    runs = [run(k, 0.77 + k / 1000, 0.76 + k / 100, seed=str(k)) for k in range(3)]
    runs += [run(10, 0.80, 0.70, **{"model.width": "96"})]  # one seed: better, but settings with more seeds are there
    runs += [run(20 + k, 0.76, 0.99, seed=str(k), **{"model.width": "32"}) for k in range(3)]  # best on test only
    table = comparison_table(TABLE, pd.DataFrame(runs))
    (row,) = measured(table)
    assert row.cell("Certified").text == "77.00 ± 1.00" and row.cell("Certified").emphasis == ""
    assert row.cell("FLOPs").text == "1.2M" and row.mark == "a"
    for words in (
        "3 runs (seeds 0, 1, 2)",
        "on validation (77.10) among 2 of 3 on record, those with at least 3 seeds",
        "certifier lipschitz",
        "PGD (20 steps)",
        "2 CPU cores",
        "1 worker of 2 CPUs",
        "1.00 hours each",
        "25 epochs",
    ):
        assert words in row.note, words
    assert row.command.splitlines() == [f"linflab train r seed={k}" for k in range(3)]
    assert row.runs == tuple(f"{k:032x}" for k in range(3))
    few = TABLE.model_copy(update={"measured": TABLE.measured.model_copy(update={"seeds": 1})})  # type: ignore[union-attr]
    (row,) = measured(comparison_table(few, pd.DataFrame(runs)))
    assert row.cell("Certified").text == "70.00" and "1 run (seed 0)" in row.note


@pytest.mark.parametrize("attack, alike", [("PGD (20 steps)", True), ("PGD (100 steps)", False)])
def test_rows_that_were_not_attacked_alike_are_said_to_be_so(attack: str, alike: bool) -> None:
    runs = [run(1, 0.78, 0.77), run(2, 0.78, 0.76, method="IBP", **{schema.ATTACK: attack})]
    table = comparison_table(TABLE, pd.DataFrame(runs))
    assert len(measured(table)) == 2
    assert ("not all measured rows were attacked alike" in " ".join(table.notes)) == (not alike)


def test_the_same_seed_again_counts_once_and_a_final_training_takes_the_row() -> None:
    runs = [run(2, 0.78, 0.77), run(1, 0.78, 0.10)]  # the latest comes first
    (row,) = measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.cell("Certified").text == "77.00"
    runs += [run(3, None, 0.78, **{"training.include_validation": "True"})]
    runs += [run(4, None, 0.99, **{"training.include_validation": "True", "model.width": "8"})]  # settings not chosen
    (row,) = measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.cell("Certified").text == "78.00" and "then trained on training and validation images" in row.note
    (row,) = measured(comparison_table(TABLE, pd.DataFrame(runs[2:3])))
    assert row.cell("Certified").text == "78.00" and "not chosen by validation" in row.note


def test_of_equal_settings_the_quickest_to_train_take_the_row() -> None:
    runs = [
        run(4, 0.78, 0.99, **{"model.width": "96", schema.TRAIN_SECONDS: 400.0}),
        run(3, 0.78, 0.77, **{schema.TRAIN_SECONDS: 200.0}),
        run(2, 0.70, 0.98, **{"model.width": "8", schema.TRAIN_SECONDS: 100.0}),
        run(1, 0.78, 0.77, **{schema.TRAIN_SECONDS: 210.0}),  # again the same
    ]
    for order in (runs, [runs[1], runs[2], runs[0], runs[3]]):
        (row,) = measured(comparison_table(TABLE, pd.DataFrame(order)))
        assert row.cell("Certified").text == "77.00"
        assert "(78.00) among 3 on record (2 came to it; the quickest of them to train was taken)" in row.note


def test_what_repeats_a_run_says_its_commit() -> None:
    """Recipes change. It is no part of what is copied."""
    runs = [run(k, 0.78, 0.77, seed=str(k)) for k in range(3)]
    runs[0][schema.COMMIT], runs[1][schema.COMMIT] = "0123456789abcdef", "0123456789abcdef-dirty"
    (row,) = measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.command.splitlines() == [f"linflab train r seed={k}" for k in range(3)]
    assert [commit for _, commit in row.again] == ["012345678", "012345678-dirty", ""]
    table = comparison_table(TABLE, pd.DataFrame(runs))
    assert "- (a): `linflab train r seed=1` (linflab 012345678-dirty)\n" in to_markdown(table)
    assert "<code>linflab train r seed=0</code> (linflab 012345678)</li>" in to_html(table)


def test_a_note_says_the_objective_and_whether_there_was_a_choice() -> None:
    (row,) = measured(comparison_table(TABLE, pd.DataFrame([run(1, 0.78, 0.77, **{"objective.kind": "hinge"})])))
    assert "objective hinge; the only settings on record (certified on validation: 78.00); certifier" in row.note
    (row,) = measured(comparison_table(TABLE, pd.DataFrame([run(1, 0.78, 0.77)])))
    assert "objective" not in row.note


def test_means_that_differ_by_rounding_are_equal() -> None:
    first, second = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    assert sum(first) != sum(second)
    runs = [run(seed, value, 0.9, seed=str(seed)) for seed, value in enumerate(first)]
    wide = {"model.width": "96", schema.TRAIN_SECONDS: 1.0}
    runs += [run(10 + seed, value, 0.5, seed=str(seed), **wide) for seed, value in enumerate(second)]
    (row,) = measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.cell("Certified").text == "50.00 ± 0.00" and "(2 came to it" in row.note


def test_runs_without_scores_are_left_out_and_counted() -> None:
    runs = [
        run(1, 0.78, 0.77),
        run(2, None, None, status="FAILED"),
        run(3, 0.99, None, status="RUNNING"),
        run(4, 0.99, None),
        run(5, 0.99, 0.99, eps="0.2"),
        {"run_id": "6", "status": "RUNNING", "started": 6, schema.KIND: "trial"},  # nothing but made
    ]
    table = comparison_table(TABLE, pd.DataFrame(runs))
    (row,) = measured(table)
    assert row.cell("Certified").text == "77.00"
    notes = " ".join(table.notes)
    assert "1 runs that have failed" in notes and "1 runs that are running" in notes
    assert "1 that were not scored on the test set" in notes


def test_a_missing_metric_is_a_dash() -> None:
    (row,) = measured(comparison_table(TABLE, pd.DataFrame([run(1, 0.78, 0.77, **{schema.TEST_ROBUST: None})])))
    assert row.cell("Robust").text == "-" and row.cell("Certified").text == "77.00"
    table = comparison_table(TABLE, pd.DataFrame([run(1, 0.78, 0.77, **{schema.FLOPS: None})]))
    for text in (to_markdown(table), to_latex(table), to_html(table), to_csv(table)):
        assert "nan" not in text.lower()


def test_best_of_group_and_of_kind() -> None:
    runs = [run(1, 0.78, 0.80), run(2, 0.7, 0.75, method="other"), run(3, 0.7, 0.65, method="third")]
    table = comparison_table(TABLE, pd.DataFrame(runs))
    by_method = {
        row.cell("Method").text: row.cell("Certified").emphasis for row in table.rows if row.kind == "measured"
    }
    assert by_method == {"l_inf-dist Net": "best", "other": "", "third": ""}
    quoted = {row.cell("Certified").text: row.cell("Certified").emphasis for row in table.rows if row.kind == "quoted"}
    assert quoted == {"65.47": "", "77.67": "", "78.01": "", "77.48": "", "79.23": "best of kind"}
    clean = {row.cell("Test").text: row.cell("Test").emphasis for row in table.rows if row.kind == "quoted"}
    assert clean["87.91"] == "best"  # twice
    assert (
        "**80.00**" in to_markdown(table) and r"\textbf{80.00}" in to_latex(table) and "<b>80.00</b>" in to_html(table)
    )
    assert "<u>79.23</u>" in to_markdown(table) and r"\underline{79.23}" in to_latex(table)


def test_the_fastest_epoch_is_the_best() -> None:
    table = comparison_table(load_definition("table4"), pd.DataFrame())
    assert {row.cell("Method").text for row in table.rows if row.cell(table.columns[1]).emphasis} == {"IBP"}


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "title: Widths\ncolumns: [Method, Model, Epochs, Certified, Runs, Hours, CPUs]\n"
        "groups: [{dataset: fashion_mnist, eps: 25.5/255}]\n"
        "measured: {by: [method, model.width], where: {training.epochs: 25}}\n"
    )
    runs = [run(k, 0.7, 0.7, **{"model.width": str(32 * k)}) for k in (1, 2)] + [
        run(3, 0.9, 0.9, **{schema.EPOCHS: "50"})
    ]
    table = comparison_table(load_definition(str(file)), pd.DataFrame(runs))
    assert [row.cell("Method").text for row in table.rows] == ["l_inf-dist Net (width=32)", "l_inf-dist Net (width=64)"]
    shown = [table.rows[0].cell(name).text for name in table.columns[1:]]
    assert shown == ["width=32", "25", "70.00", "1", "1.00", "2"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no YAML"),
        ("- 1", "must have title and groups"),
        ("title: t", "groups: field required"),
        ("title: t\ngroups: []", "groups=[]"),
        ("title: t\ngroups: [{dataset: mnist, eps: 3}]", "eps=3: must be a radius"),
        ("title: t\ngroups: [{dataset: mnist, eps: 1/0}]", "eps=1/0: must be a radius"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1}]\nquoted: [me]", "quoted=me: there is no such source"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1}]\ncolumns: [Tset]", "columns.0=Tset"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1}]\nmeasured: {seed: 3}", "measured.seed=3"),
    ],
)
def test_wrong_definitions(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"table=.*mine\.yaml: ") as caught:
        load_definition(str(file))
    assert says in str(caught.value)
    with pytest.raises(ValueError, match="neither a file nor one of the shipped tables, measured, successors, table1"):
        load_definition("table9")


def test_runs_and_sweeps_by_name() -> None:
    job = {schema.SWEEP: "mine", schema.SEARCHED: "model.width"}
    runs = [run(1, 0.7, 0.6), *(run(k, 0.6 + k / 100, 0.5, seed="0", **{**job, schema.TRIAL: str(k)}) for k in (2, 3))]
    runs += [run(4, 0.5, 0.7, seed="1", **{**job, schema.TRIAL: "3-seed1"})]
    frame = pd.DataFrame(runs)
    table = table_of(frame, ["mine", f"{1:032x}"], quoted=True)
    best, single = measured(table)
    assert best.cell("Certified").text == "60.00 ± 14.14" and "its trial 3" in best.note
    assert single.cell("Certified").text == "60.00" and "as asked for" in single.note
    assert len(table.rows) == 2 + 5
    for wrong, says in (
        ("nobody", "is no such run or sweep; `linflab runs` lists .*; sweeps: mine"),
        ("0", "several runs"),
    ):
        with pytest.raises(LookupError, match=says):
            table_of(frame, [wrong], quoted=False)
    with pytest.raises(LookupError, match="no test scores"):
        table_of(pd.DataFrame([run(7, 0.1, None)]), [f"{7:032x}"], quoted=False)


def test_the_table_in_the_readme_and_settings_that_nobody_has() -> None:
    text = Path("README.md").read_text().split("```yaml\ntitle:")[1].split("```")[0]
    definition = TableDefinition.model_validate(yaml.safe_load(f"title:{text}"))
    hybrid = {"method": "Net+MLP", "model.width": None, "model.net.width": "64"}
    for runs in ([], [run(1, 0.7, 0.7), run(2, 0.7, 0.7, **hybrid)]):
        table = comparison_table(definition, pd.DataFrame(runs))
        methods = [row.cell("Method").text for row in measured(table)]
        assert methods == ["Net+MLP", "l_inf-dist Net (width=64)"][: len(runs)]
        assert "nan" not in to_markdown(table)
    typo = Measured(by=("method", "model.widht"), where={"training.epoch": 25})
    table = comparison_table(TABLE.model_copy(update={"measured": typo}), pd.DataFrame([run(1, 0.7, 0.7)]))
    assert not measured(table)
    for path in ("model.widht", "training.epoch"):
        assert f"No run of Fashion MNIST (eps = 0.1) has a setting {path}." in table.notes
    for by in ([], ["method", "method"], ["seed"], ["method", "compute.workers"]):
        with pytest.raises(ValueError, match="by="):
            Measured(by=by)  # type: ignore[arg-type]


def test_rows_by_size_however_many() -> None:
    many = pd.DataFrame([run(k, 0.7, 0.7, **{"model.width": str(k)}) for k in range(1, 801)])
    table = comparison_table(TABLE.model_copy(update={"measured": Measured(by=("model.width",))}), many)
    assert [row.cell("Method").text for row in measured(table)][9] == "l_inf-dist Net (width=10)"
    assert len({row.mark for row in measured(table)}) == 800


NASTY = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@given(NASTY)
@example("a\\|b")
@example("a\nb")
@example("[x](y) `z` _u_ **v** <b> &lt;")
def test_no_text_breaks_a_format(method: str) -> None:
    """Whatever a method is called: as many cells in every row, in every format."""
    table = comparison_table(TABLE, pd.DataFrame([run(1, 0.78, 0.77, method=method or "m")]))
    rows = list(csv.reader(io.StringIO(to_csv(table), newline="")))
    assert {len(row) for row in rows} == {len(rows[0])}
    shown = " ".join((method or "m").split())
    assert rows[-1][0] == shown
    rendered = MarkdownIt("commonmark").enable("table").render(to_markdown(table))
    assert rendered.count("<td") == 5 * (len(table.rows) + 1)  # and the heading of the group
    names = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", rendered)]
    assert f"{shown} <sup>a</sup>".strip() in names
    body = [line.replace(r"\&", "") for line in to_latex(table).split("\n") if line.endswith(r" \\")]
    assert {line.count("&") for line in body if "multicolumn" not in line} == {4}
    assert to_html(table).count("<td") == 5 * len(table.rows)


def test_the_terminal_shows_what_is_measured() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_table(comparison_table(TABLE, pd.DataFrame([run(1, 0.78, 0.77)])), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "l_inf-dist Net [a]" in text and "[a] measured: 1 run (seed 0)" in text
    assert "Fashion MNIST (eps = 0.1)" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 60, 80, 100, 130])
def test_no_number_is_cut_on_a_narrow_terminal(width: int) -> None:
    """What there is no room for is named."""
    columns = ("Method", "Model", "Epochs", "FLOPs", "Test", "Robust", "Certified", "Hours", "CPUs", "Runs")
    runs = [run(k, 0.78 + k / 100, 0.77 + k / 100, seed=str(k), **{schema.TRAIN_SECONDS: 500.0 * k}) for k in range(3)]
    table = comparison_table(TABLE.model_copy(update={"columns": columns}), pd.DataFrame(runs))
    console = Console(file=io.StringIO(), width=width)
    print_table(table, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    shown = text.partition("Accuracies in percent.")[0]
    assert max(map(len, text.splitlines())) <= max(width, 60)  # the least that methods and accuracies take
    assert all(part in shown for part in ("l_inf-dist", "Net+MLP", "Fashion", "[a]", "Certified"))
    for row in table.rows:
        assert all(row.cell(column).text in shown for column in ("Test", "Robust", "Certified"))
    left_out = re.search(r"too narrow for ([^;]*);", " ".join(shown.split()))
    header = shown.split("─")[0]
    assert all((column in header) != (column in (left_out[1].split(", ") if left_out else [])) for column in columns)
    assert (width < 130) <= bool(left_out)


def test_radii_as_papers_write_them() -> None:
    assert [eps_text(eps) for eps in (0.1, 0.3, 8 / 255, 2 / 255, 0.2, 0.031)] == [
        "0.1", "0.3", "8/255", "2/255", "0.2", "0.031",
    ]  # fmt: skip
