"""Comparison tables: quoted rows as printed, measured rows selected on validation, and their notes."""

import io
import re
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest
import yaml

from linflab.reports import labels, schema
from linflab.reports.comparison import (
    MeasuredRows,
    TableDefinition,
    _footnote_marks,
    comparison_table,
    load_definition,
    table_for_names,
)
from linflab.reports.papers import list_tables
from linflab.reports.rendering import print_table, to_csv, to_html, to_latex, to_markdown
from linflab.reports.tables import format_eps
from linflab.reports.terminal import PlainConsole
from linflab.search_spaces.strict_yaml import read_mapping
from tests.conftest import assert_rejected, has_words
from tests.reports.runs import TABLE, make_run, select_measured

# The tables of Zhang et al., ICML 2021, transcribed from the paper: the expected cells.
PAPER = {
    "table1": """
MNIST (eps = 0.3)
Group Sort (Anil et al., 2019)|2.9M|97.0|34.0|2.0
COLT (Balunovic & Vechev, 2020)|4.9M|97.3|-|85.7
IBP (Gowal et al., 2018)|114M|97.88|93.22|91.79
CROWN-IBP (Zhang et al., 2020b)|114M|98.18|93.95|92.98
l_inf-dist Net|82.7M|98.54|94.71|92.64
l_inf-dist Net+MLP|85.3M|98.56|95.28|93.09
Fashion-MNIST (eps = 0.1)
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


def test_verified_accuracy_has_a_column_and_its_images_in_the_note() -> None:
    text = "200 of 10000 images by cascade-sound (time limit 30 s): 71.00% certified, 3.00% undecided"
    runs = [make_run(k, 0.8, 0.7, seed=str(k)) for k in range(3)]
    runs[0] |= {schema.TEST_VERIFIED: 0.71, schema.TEST_VERIFICATION: text}
    definition = TABLE.model_copy(update={"columns": ("Method", "Certified", "Verified")})
    table = comparison_table(definition, pd.DataFrame(runs))
    (row,) = [row for row in table.rows if row.origin == "measured"]
    assert row.cell("Verified").value == pytest.approx(71) and text in row.footnote
    assert "test/verified_accuracy from 1 of 3 runs" in row.footnote and any("Verified:" in one for one in table.notes)
    plain = comparison_table(TABLE, pd.DataFrame([make_run(0, 0.8, 0.7)]))
    assert "Verified" not in " ".join([*plain.notes, *(row.footnote for row in plain.rows)])


@pytest.mark.parametrize(
    ("other", "is_alike"),
    [
        ("200 of 10000 images by cascade-sound (time limit 30 s): 73.00% certified", True),
        ("8 of 10000 images by cascade-sound (time limit 30 s): 73.00% certified", False),
        ("200 of 10000 images by cascade-sound (time limit 3 s): 73.00% certified", False),
        ("200 of 10000 images by cascade (real arithmetic, time limit 30 s): 73.00% certified", False),
        (None, True),  # a verification that was interrupted while it was logged
    ],
)
def test_only_verifications_under_equal_conditions_are_averaged(other: str | None, is_alike: bool) -> None:
    runs = [make_run(k, 0.8, 0.7, seed=str(k)) for k in range(3)]
    text = "200 of 10000 images by cascade-sound (time limit 30 s): 71.00% certified"
    runs[0] |= {schema.TEST_VERIFIED: 0.71, schema.TEST_VERIFICATION: text}
    runs[1] |= {schema.TEST_VERIFIED: 0.73, schema.TEST_VERIFICATION: other}
    definition = TABLE.model_copy(update={"columns": ("Method", "Verified")})
    (row,) = select_measured(comparison_table(definition, pd.DataFrame(runs)))
    assert text in row.footnote and (other or text) in row.footnote
    assert row.cell("Verified").value == (pytest.approx(72 if other else 71) if is_alike else None)
    assert ("No mean of verified" in row.footnote) != is_alike
    assert f"from {2 if other else 1} of 3 runs" in row.footnote


def test_verifications_under_other_conditions_are_named_in_a_note() -> None:
    definition = TABLE.model_copy(update={"columns": ("Method", "Verified")})
    for certificate, is_alike in (("cascade-sound", True), ("cascade", False)):
        runs = [make_run(k, 0.8, 0.7, **{schema.METHOD: f"m{k}", "method": f"m{k}"}) for k in range(2)]
        for run, name in zip(runs, ("cascade-sound", certificate), strict=True):
            text = f"200 of 10000 images by {name} (time limit 30 s): 71.00% certified"
            run |= {schema.TEST_VERIFIED: 0.71, schema.TEST_VERIFICATION: text}
        table = comparison_table(definition, pd.DataFrame(runs))
        assert len(select_measured(table)) == 2
        assert any("Verified:" in note and "differ" in note for note in table.notes) != is_alike


@pytest.mark.parametrize("name", list(PAPER))
def test_paper_is_quoted_cell_by_cell(name: str) -> None:
    table = comparison_table(load_definition(name, read_mapping), pd.DataFrame())
    shown = []
    for row in table.rows:
        if row.group not in shown:
            shown.append(row.group)
        shown.append("|".join(row.cell(column).text for column in table.columns))
    assert shown == PAPER[name].strip().splitlines()
    assert any("arxiv.org/abs/2102.05363" in note for note in table.notes)


def test_every_shipped_table_has_rows_without_any_run() -> None:
    since_2022 = {f"certified_training_{dataset}" for dataset in ("mnist", "cifar10", "tiny_imagenet")}
    assert set(list_tables()) == {"measured", "table1", "table2", "table4", "successors", *since_2022}
    for name in list_tables():
        table = comparison_table(load_definition(name, read_mapping), pd.DataFrame())
        assert table.rows and all(row.source for row in table.rows)
        notes = " ".join(table.notes)
        assert ("secondary" in notes) == (name in {"successors", "measured", *since_2022})


def test_rows_are_selected_on_validation_and_averaged_over_seeds() -> None:
    runs = [make_run(k, 0.77 + k / 1000, 0.76 + k / 100, seed=str(k)) for k in range(3)]
    runs += [make_run(10, 0.80, 0.70, **{"model.width": "96"})]  # better, but other settings have more seeds
    runs += [make_run(20 + k, 0.76, 0.99, seed=str(k), **{"model.width": "32"}) for k in range(3)]  # best on test only
    table = comparison_table(TABLE, pd.DataFrame(runs))
    (row,) = select_measured(table)
    assert row.cell("Certified").text == "77.00 ± 1.00" and row.cell("Certified").emphasis == ""
    assert row.cell("FLOPs").text == "1.2M" and row.footnote_mark == "a"
    seeds, choice = "0, 1, 2", ("77.10", "2 of 3", "3 seeds")
    for part in (seeds, *choice, "lipschitz", "PGD (20 steps)", "2 CPU cores", "1.00 hours", "25 epochs"):
        assert has_words(row.footnote, part), part
    assert row.command.splitlines() == [f"linflab train r seed={k}" for k in range(3)]
    assert row.runs == tuple(f"{k:032x}" for k in range(3))
    one_seed = TABLE.model_copy(update={"measured": TABLE.measured.model_copy(update={"min_seeds": 1})})  # type: ignore[union-attr]
    (row,) = select_measured(comparison_table(one_seed, pd.DataFrame(runs)))
    assert row.cell("Certified").text == "70.00" and row.runs == (f"{10:032x}",)


def test_real_arithmetic_does_not_compete_with_sound_certificates_of_the_same_training() -> None:
    """Its accuracy is never lower, so it would always be selected."""
    real = make_run(1, 0.78, 0.77, **{"evaluation.sound": "False"})
    sound = make_run(2, 0.77, 0.76, **{"evaluation.sound": "True", schema.CERTIFIER: "lipschitz-sound"})
    other = make_run(3, 0.775, 0.75, **{"evaluation.sound": "False", "model.width": "96"})
    complete = {**other, schema.CERTIFIER: "complete"}
    # A sound configuration with fewer seeds, or without final runs, does not replace one in real arithmetic.
    seeds = [make_run(10 + k, 0.78, 0.77, seed=str(k), **{"evaluation.sound": "False"}) for k in range(3)]
    final = make_run(4, None, 0.8, **{"evaluation.sound": "False", "training.include_validation": "True"})
    for runs, numbers, choice in (
        ([real, sound], [2], "Only configuration (77.00% on validation)"),
        ([real], [1], "Only configuration (78.00% on validation)"),
        ([real, sound, other], [3], "Best of 2 on validation (77.50%)"),
        ([sound, complete], [3], "Best of 2 on validation (77.50%), by different certifiers"),
        ([*seeds, sound], [10, 11, 12], "Best of 1 of 2 with at least 3 seeds on validation (78.00%)"),
        ([real, sound, final], [4], "Best of 2 on validation (78.00%), retrained with validation images"),
    ):
        (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(runs)))
        assert row.runs == tuple(f"{number:032x}" for number in numbers), choice
        assert f" {choice}. " in row.footnote


def test_rows_state_on_which_images_they_were_selected() -> None:
    retrained = make_run(1, None, 0.77, **{"training.include_validation": "True"})
    for runs, images in (([retrained], "unknown"), ([retrained, make_run(2, 0.78, 0.76)], "validation")):
        table = comparison_table(TABLE, pd.DataFrame(runs))
        (row,) = select_measured(table)
        assert row.selected_on == images
        assert any("Configurations are selected" in note for note in table.notes) == (images == "validation")


def test_filters_match_values_as_in_yaml_and_defaults_of_earlier_versions() -> None:
    new = {"model.kind": "conv_net", "model.variant": "xu2020", "training.recalibrate_batch_norm": "False"}
    runs = [
        make_run(1, 0.78, 0.77, **{"model.kind": "conv_net", "optimizer.learning_rate": "0.001", "model.width": "1"}),
        make_run(2, 0.78, 0.77, **new, **{"objective.eps_train": str(8 / 255), "model.width": "2"}),
        make_run(3, 0.78, 0.77, **{"model.kind": "linf_dist_mlp", "model.width": "3"}),
    ]
    for text, numbers in (
        ("optimizer.learning_rate: 1e-3", [1]), ("objective.eps_train: 8/255", [2]),
        ("training.recalibrate_batch_norm: false", [1, 2, 3]), ("model.variant: xu2020", [1, 2]),
        ("optimizer.algorithm: adamw", [1, 2, 3]), ("optimizer.algorithm: sgd", []),
        # The order of filters does not matter.
        ("{model.width: 1, model.variant: xu2020}", [1]), ("{model.variant: xu2020, model.width: 1}", [1]),
    ):  # fmt: skip
        measured = MeasuredRows(filters=yaml.safe_load(text), group_by=("model.width",))
        table = comparison_table(TABLE.model_copy(update={"measured": measured}), pd.DataFrame(runs))
        selected = [run for row in select_measured(table) for run in row.runs]
        assert sorted(selected) == [f"{number:032x}" for number in numbers], text
        assert not any("no run has the setting" in note for note in table.notes), text
    measured = MeasuredRows(filters={"model.variant": "xu2020"})  # a setting of the network that no run has
    table = comparison_table(TABLE.model_copy(update={"measured": measured}), pd.DataFrame([runs[0]]))
    assert any("no run has the setting model.variant" in note for note in table.notes)


def test_long_table_for_latex_shows_rows_before_notes_and_measured_rows_first() -> None:
    runs = pd.DataFrame([make_run(k, 0.7, 0.7, **{"model.width": str(k)}) for k in range(20)])
    measured = MeasuredRows(group_by=("model.width",))
    table = comparison_table(TABLE.model_copy(update={"measured": measured}), runs)
    text = to_latex(table)
    assert all(f"(width={k})" in text for k in range(20))
    hidden = [line for line in text.splitlines() if line.startswith("% (") and "Only configuration" in line]
    assert (
        len(hidden) == 20 and "20 more notes: see the comments in the LaTeX file." in text and "more rows" not in text
    )
    many = pd.DataFrame([make_run(k, 0.7, 0.7, **{"model.width": str(k)}) for k in range(40)])
    text = to_latex(comparison_table(TABLE.model_copy(update={"measured": measured}), many))
    assert "CROWN-IBP" not in text and "more rows: see the CSV file." in text


@pytest.mark.parametrize("attack, is_equal", [("PGD (20 steps)", True), ("PGD (100 steps)", False)])
def test_rows_with_different_attacks_get_a_note(attack: str, is_equal: bool) -> None:
    runs = [make_run(1, 0.78, 0.77), make_run(2, 0.78, 0.76, method="IBP", **{schema.ATTACK: attack})]
    table = comparison_table(TABLE, pd.DataFrame(runs))
    assert len(select_measured(table)) == 2
    equal = comparison_table(TABLE, pd.DataFrame([runs[0], {**runs[1], schema.ATTACK: "PGD (20 steps)"}]))
    assert (len(table.notes) == len(equal.notes)) == is_equal


def test_repeated_seed_counts_once_and_final_run_takes_the_row() -> None:
    runs = [make_run(2, 0.78, 0.77), make_run(1, 0.78, 0.10)]  # newest first
    (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.cell("Certified").text == "77.00"
    runs += [make_run(3, None, 0.78, **{"training.include_validation": "True"})]
    # These settings are not selected.
    runs += [make_run(4, None, 0.99, **{"training.include_validation": "True", "model.width": "8"})]
    (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.cell("Certified").text == "78.00" and row.runs == (f"{3:032x}",)
    (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(runs[2:3])))
    assert row.cell("Certified").text == "78.00" and "validation (" not in row.footnote  # not selected on validation


def test_fastest_configuration_takes_the_row_on_a_tie() -> None:
    runs = [
        make_run(4, 0.78, 0.99, **{"model.width": "96", schema.TRAIN_SECONDS: 400.0}),
        make_run(3, 0.78, 0.77, **{schema.TRAIN_SECONDS: 200.0}),
        make_run(2, 0.70, 0.98, **{"model.width": "8", schema.TRAIN_SECONDS: 100.0}),
        make_run(1, 0.78, 0.77, **{schema.TRAIN_SECONDS: 210.0}),  # the same configuration and seed
    ]
    for order in (runs, [runs[1], runs[2], runs[0], runs[3]]):
        (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(order)))
        assert row.cell("Certified").text == "77.00"
        assert row.runs == (f"{3:032x}",) and has_words(row.footnote, "78.00") and has_words(row.footnote, "3")


def test_reproduce_commands_name_the_commit() -> None:
    """Recipes change between commits. The commit is not part of the command to copy."""
    runs = [make_run(k, 0.78, 0.77, seed=str(k)) for k in range(3)]
    runs[0][schema.COMMIT], runs[1][schema.COMMIT] = "0123456789abcdef", "0123456789abcdef-dirty"
    (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.command.splitlines() == [f"linflab train r seed={k}" for k in range(3)]
    assert [commit for _, commit in row.reproduce_commands] == ["012345678", "012345678-dirty", ""]
    table = comparison_table(TABLE, pd.DataFrame(runs))
    assert "- (a): `linflab train r seed=1` (linflab 012345678-dirty)\n" in to_markdown(table)
    assert "<code>linflab train r seed=0</code> (linflab 012345678)</li>" in to_html(table)


def test_reproduce_commands_import_own_modules() -> None:
    runs = [make_run(k, 0.78, 0.77, seed=str(k)) for k in range(3)]
    runs[0][schema.MODULES] = "my_parts,my.losses"
    (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(runs)))
    expected = [f"linflab train r seed={k}" for k in range(3)]
    assert row.command.splitlines() == [f"LINFLAB_IMPORT=my_parts,my.losses {expected[0]}", *expected[1:]]


def test_footnote_of_one_configuration_has_its_val_accuracy() -> None:
    (row,) = select_measured(comparison_table(TABLE, pd.DataFrame([make_run(1, 0.78, 0.77)])))
    assert has_words(row.footnote, "78.00") and not has_words(row.footnote, "of 1")


def test_means_that_differ_by_rounding_are_equal() -> None:
    first, second = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    assert sum(first) != sum(second)
    runs = [make_run(seed, value, 0.9, seed=str(seed)) for seed, value in enumerate(first)]
    wide = {"model.width": "96", schema.TRAIN_SECONDS: 1.0}
    runs += [make_run(10 + seed, value, 0.5, seed=str(seed), **wide) for seed, value in enumerate(second)]
    (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.cell("Certified").text == "50.00 ± 0.00"


def test_runs_without_test_results_are_excluded_and_counted() -> None:
    runs = [
        make_run(1, 0.78, 0.77),
        make_run(2, None, None, status="FAILED"),
        make_run(3, 0.99, None, status="RUNNING"),
        make_run(4, 0.99, None),
        make_run(5, 0.99, 0.99, eps="0.2"),
        {"run_id": "6", "status": "RUNNING", "start_time": 6, schema.KIND: "trial"},  # created, but nothing logged
    ]
    table = comparison_table(TABLE, pd.DataFrame(runs))
    (row,) = select_measured(table)
    assert row.cell("Certified").text == "77.00"
    notes = " ".join(table.notes)
    assert notes.count(" 1 ") == 3  # failed, running, and not evaluated on the test set


def test_missing_metric_is_a_dash() -> None:
    (row,) = select_measured(
        comparison_table(TABLE, pd.DataFrame([make_run(1, 0.78, 0.77, **{schema.TEST_ROBUST: None})]))
    )
    assert row.cell("Robust").text == "-" and row.cell("Certified").text == "77.00"
    table = comparison_table(TABLE, pd.DataFrame([make_run(1, 0.78, 0.77, **{schema.FLOPS: None})]))
    for text in (to_markdown(table), to_latex(table), to_html(table), to_csv(table)):
        assert "nan" not in text.lower()


def test_best_cells_of_group_and_origin_are_emphasized() -> None:
    runs = [make_run(1, 0.78, 0.80), make_run(2, 0.7, 0.75, method="other"), make_run(3, 0.7, 0.65, method="third")]
    table = comparison_table(TABLE, pd.DataFrame(runs))
    by_method = {
        row.cell("Method").text: row.cell("Certified").emphasis for row in table.rows if row.origin == "measured"
    }
    assert by_method == {"l_inf-dist Net": "best", "other": "", "third": ""}
    quoted = {
        row.cell("Certified").text: row.cell("Certified").emphasis for row in table.rows if row.origin == "quoted"
    }
    assert quoted == {"65.47": "", "77.67": "", "78.01": "", "77.48": "", "79.23": "best of kind"}
    clean = {row.cell("Clean").text: row.cell("Clean").emphasis for row in table.rows if row.origin == "quoted"}
    assert clean["87.91"] == "best"  # twice
    assert (
        "**80.00**" in to_markdown(table) and r"\textbf{80.00}" in to_latex(table) and "<b>80.00</b>" in to_html(table)
    )
    assert "<u>79.23</u>" in to_markdown(table) and r"\underline{79.23}" in to_latex(table)


def test_fastest_epoch_is_the_best() -> None:
    table = comparison_table(load_definition("table4", read_mapping), pd.DataFrame())
    assert {row.cell("Method").text for row in table.rows if row.cell(table.columns[1]).emphasis} == {"IBP"}


def test_table_is_read_from_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "title: Widths\ncolumns: [Method, Model, Epochs, Certified, Runs, Hours, CPUs]\n"
        "groups: [{dataset: fashion_mnist, eps: 25.5/255}]\n"
        "measured: {group_by: [method, model.width], filters: {training.epochs: 25}}\n"
    )
    runs = [make_run(k, 0.7, 0.7, **{"model.width": str(32 * k)}) for k in (1, 2)] + [
        make_run(3, 0.9, 0.9, **{schema.EPOCHS: "50"})
    ]
    table = comparison_table(load_definition(str(file), read_mapping), pd.DataFrame(runs))
    assert [row.cell("Method").text for row in table.rows] == ["l_inf-dist Net (width=32)", "l_inf-dist Net (width=64)"]
    shown = [table.rows[0].cell(name).text for name in table.columns[1:]]
    assert shown == ["width=32", "25", "70.00", "1", "1.00", "2"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "line 1"),
        ("- 1", "mapping"),
        ("title: t", "groups"),
        ("title: t\ngroups: []", "groups=[]"),
        ("title: t\ngroups: [{dataset: mnist, eps: 3}]", "eps=3"),
        ("title: t\ngroups: [{dataset: mnist, eps: 1/0}]", "eps=1/0"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1}]\nquoted: [me]", "quoted=me"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1}]\ncolumns: [Tset]", "columns.0=Tset"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1}]\nmeasured: {seed: 3}", "measured.seed=3"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1}]\nmeasured: {seed: 3}", "min_seeds"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1, seed: 3}]", "groups.0.seed=3"),
        ("title: t\ngroups: [{dataset: mnist, eps: 0.1}]\nwidth: 3", "runs_file"),
    ],
)
def test_invalid_definitions_are_rejected(content: str, part: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match="table=") as caught:
        load_definition(str(file), read_mapping)
    assert_rejected(caught, f"table={file}", part)


def test_unknown_table_error_names_shipped_tables() -> None:
    with pytest.raises(ValueError, match="table=table9") as caught:
        load_definition("table9", read_mapping)
    assert_rejected(caught, *list_tables())


def test_runs_and_sweeps_are_found_by_name() -> None:
    sweep_tags = {schema.SWEEP: "mine", schema.SEARCHED_SETTINGS: "model.width"}
    runs = [
        make_run(1, 0.7, 0.6),
        *(make_run(k, 0.6 + k / 100, 0.5, seed="0", **{**sweep_tags, schema.TRIAL: str(k)}) for k in (2, 3)),
    ]
    runs += [make_run(4, 0.5, 0.7, seed="1", **{**sweep_tags, schema.TRIAL: "3-seed1"})]
    frame = pd.DataFrame(runs)
    frame[schema.NAME] = ["wide", "narrow", "narrow", "0"]
    table = table_for_names(frame, ["mine", f"{1:032x}"], quoted=True)
    best, single = select_measured(table)
    for name in ("wide", "0"):  # a name takes precedence over the prefix of an id
        (by_name,) = select_measured(table_for_names(frame, [name], quoted=False))
        assert by_name.cell("Certified").text == {"wide": "60.00", "0": "70.00"}[name]
    assert best.cell("Certified").text == "60.00 ± 14.14" and has_words(best.footnote, "trial 3")
    assert single.cell("Certified").text == "60.00" and single.runs == (f"{1:032x}",)
    assert len(table.rows) == 2 + 5
    for wrong, parts in (
        ("nobody", ["`linflab runs`", "mine"]),
        ("00", []),
        ("narrow", ["2"]),
    ):
        with pytest.raises(LookupError) as caught:
            table_for_names(frame, [wrong], quoted=False)
        assert_rejected(caught, wrong, *parts)
    with pytest.raises(LookupError, match=f"{7:032x}"):
        table_for_names(pd.DataFrame([make_run(7, 0.1, None)]), [f"{7:032x}"], quoted=False)


def test_documented_table_is_valid_and_unused_settings_get_notes() -> None:
    text = Path("docs/how-to/report.md").read_text().split("```yaml\ntitle:")[1].split("```")[0]
    definition = TableDefinition.model_validate(yaml.safe_load(f"title:{text}"))
    hybrid = {"method": "Net+MLP", "model.width": None, "model.backbone.width": "64"}
    for runs in ([], [make_run(1, 0.7, 0.7), make_run(2, 0.7, 0.7, **hybrid)]):
        table = comparison_table(definition, pd.DataFrame(runs))
        methods = [row.cell("Method").text for row in select_measured(table)]
        assert methods == ["Net+MLP", "l_inf-dist Net (width=64)"][: len(runs)]
        assert "nan" not in to_markdown(table)
    typo = MeasuredRows(group_by=("method", "model.widht"), filters={"training.epoch": 25})
    table = comparison_table(TABLE.model_copy(update={"measured": typo}), pd.DataFrame([make_run(1, 0.7, 0.7)]))
    assert not select_measured(table)
    for path in ("model.widht", "training.epoch"):
        assert any(has_words(note, path) and "Fashion-MNIST (eps = 0.1)" in note for note in table.notes)
    for by in ([], ["method", "method"], ["seed"], ["method", "compute.workers"]):
        with pytest.raises(ValueError, match="group_by="):
            MeasuredRows(group_by=by)  # type: ignore[arg-type]


def test_many_rows_by_width_have_different_marks() -> None:
    many = pd.DataFrame([make_run(k, 0.7, 0.7, **{"model.width": str(k)}) for k in range(1, 31)])
    table = comparison_table(TABLE.model_copy(update={"measured": MeasuredRows(group_by=("model.width",))}), many)
    assert [row.cell("Method").text for row in select_measured(table)][9] == "l_inf-dist Net (width=10)"
    assert len({row.footnote_mark for row in select_measured(table)}) == 30
    assert len(set(islice(_footnote_marks(), 800))) == 800


def test_terminal_shows_measured_rows() -> None:
    console = PlainConsole(io.StringIO(), width=80)
    print_table(comparison_table(TABLE, pd.DataFrame([make_run(1, 0.78, 0.77)])), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "l_inf-dist Net [a]" in text and "\n[a] " in text
    assert "Fashion-MNIST (eps = 0.1)" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 60, 80, 100, 130])
def test_narrow_terminal_shows_every_number(width: int) -> None:
    """A line names the columns that do not fit."""
    columns = ("Method", "Model", "Epochs", "FLOPs", "Clean", "Robust", "Certified", "Hours", "CPUs", "Runs")
    runs = [
        make_run(k, 0.78 + k / 100, 0.77 + k / 100, seed=str(k), **{schema.TRAIN_SECONDS: 500.0 * k}) for k in range(3)
    ]
    table = comparison_table(TABLE.model_copy(update={"columns": columns}), pd.DataFrame(runs))
    console = PlainConsole(io.StringIO(), width=width)
    print_table(table, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    shown = text.partition("Accuracies in percent.")[0]
    assert max(map(len, text.splitlines())) <= max(width, 60)  # minimum for methods and accuracies
    assert all(part in shown for part in ("l_inf-dist", "Net+MLP", "Fashion", "[a]", "Certified"))
    for row in table.rows:
        assert all(row.cell(column).text in shown for column in ("Clean", "Robust", "Certified"))
    omitted = re.search(r"too narrow for ([^;]*);", " ".join(shown.split()))
    header = shown.split("─")[0]
    assert all((column in header) != (column in (omitted[1].split(", ") if omitted else [])) for column in columns)
    assert (width < 130) <= bool(omitted)


def test_eps_is_formatted_as_in_papers() -> None:
    assert [format_eps(eps) for eps in (0.1, 0.3, 8 / 255, 2 / 255, 0.2, 0.031)] == [
        "0.1", "0.3", "8/255", "2/255", "0.2", "0.031",
    ]  # fmt: skip


def test_runs_file_of_an_unknown_user_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "title: Mine\ncolumns: [Method]\nruns_file: ~nobodyxx/a.jsonl\nmeasured: {}\n"
        "groups: [{dataset: digits, eps: 0.1}]\n"
    )
    with pytest.raises(ValueError, match="runs_file=~nobodyxx"):
        load_definition(str(file), read_mapping)


def test_runs_of_earlier_versions_lack_settings() -> None:
    """Such runs have the behavior of the defaults; compute settings without effect do not distinguish runs."""
    defaults = {"compute.tensor_cores": "False", "optimizer.algorithm": "adamw", "optimizer.milestones": "[]"}
    runs = [
        make_run(1, 0.70, 0.70, seed="0"),
        make_run(2, 0.70, 0.72, seed="1", **defaults, **{"compute.workers": "2"}),
        make_run(3, 0.69, 0.90, seed="2", **defaults | {"compute.tensor_cores": "True"}),
        make_run(4, 0.68, 0.90, seed="2", **defaults | {"optimizer.algorithm": "radam"}),
    ]
    (row,) = select_measured(comparison_table(TABLE, pd.DataFrame(runs)))
    assert row.cell("Certified").text.startswith("71.00")  # two seeds of the best configuration
    settings = [{"model.width": "8"}, {"model.width": "9", **defaults}]
    assert labels.distinguish(["a", "a"], settings) == ["a (width=8)", "a (width=9)"]
    assert labels.distinguish(["a", "a"], [{}, {"optimizer.algorithm": "radam"}]) == ["a", "a (algorithm=radam)"]
