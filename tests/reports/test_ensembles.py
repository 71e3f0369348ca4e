"""Rows of ensembles: averaged over seeds if their members are alike, with the commands of the members."""

import pandas as pd
import pytest

from linflab.reports import schema
from linflab.reports.comparison import MeasuredRows, comparison_table, table_for_names
from linflab.reports.tables import Row
from tests.reports.runs import TABLE, make_run, select_measured

RULE = "mean of the selected networks of 2 runs"


def make_id(number: int) -> str:
    return f"{number:08x}" + "0" * 24


def make_member(number: int, **other: object) -> dict[str, object]:
    settings = {"model.kind": "linf_dist_mlp", "objective.kind": "hinge", "seed": str(number % 10), **other}
    return make_run(number, 0.77, 0.76, **{"run_id": make_id(number), **settings})


def make_ensemble(number: int, members: list[int], **other: object) -> dict[str, object]:
    ids = [make_id(one) for one in members]
    settings = {
        "method": "", "model.kind": "ensemble", "model.members.0.kind": "linf_dist_mlp",
        "model.members.1.kind": "linf_dist_mlp", "model.weights": "[]", "model.runs": str(ids), "seed": "0",
        schema.MEMBERS: ",".join(ids), schema.SELECTION: RULE,
        schema.COMMAND: f"linflab ensemble {' '.join(ids)} --name e{number}", "objective.kind": "hinge",
    }  # fmt: skip
    return make_run(number, 0.78, 0.77, **{"run_id": make_id(number), **settings, **other})


def find_rows(*runs: dict[str, object], kind: str = "Ensemble (2 l_inf-dist Net)") -> list[Row]:
    """Return the rows of ensembles whose names start with `kind`."""
    rows = select_measured(comparison_table(TABLE, pd.DataFrame(runs)))
    return [row for row in rows if row.cell("Method").text.startswith(kind)]


def numbers_of(rows: list[Row]) -> list[list[int]]:
    return [[int(run[:8], 16) for run in row.runs] for row in rows]


def test_ensembles_of_members_that_differ_in_seeds_share_a_row() -> None:
    members = [make_member(number) for number in (10, 11, 12, 13)]
    ensembles = [make_ensemble(21, [10, 11]), make_ensemble(20, [12, 13])]
    rows = find_rows(*members, *ensembles)
    assert numbers_of(rows) == [[21, 20]]
    (row,) = rows
    assert row.footnote.startswith("Seeds 0+1, 2+3. Only configuration (78.00% on validation)")
    names = ["0000000a", "0000000b", "0000000c", "0000000d"]
    assert row.reproduce_commands == (
        (f"linflab train r seed=10 --name {names[0]}", ""),
        (f"linflab train r seed=11 --name {names[1]}", ""),
        (f"linflab ensemble {names[0]} {names[1]} --name e21", ""),
        (f"linflab train r seed=12 --name {names[2]}", ""),
        (f"linflab train r seed=13 --name {names[3]}", ""),
        (f"linflab ensemble {names[2]} {names[3]} --name e20", ""),
    )


@pytest.mark.parametrize("change", ({"model.width": "65"}, {"training.epochs": "26"}))
def test_ensembles_of_members_with_other_settings_compete(change: dict[str, object]) -> None:
    members = [make_member(10), make_member(11), make_member(12), make_member(13, **change)]
    better = {schema.BEST_VALIDATION_CERTIFIED: 0.79}
    rows = find_rows(*members, make_ensemble(20, [10, 11]), make_ensemble(21, [12, 13], **better))
    assert numbers_of(rows) == [[21]]


def test_members_over_mirror_images_may_be_exchanged() -> None:
    """They are not equal to ensembles in which other members, or all, are averaged over mirror images."""
    flips = {"augmentation.horizontal_flip": "True"}
    members = [make_member(10, **flips), make_member(11), make_member(12), make_member(13, **flips)]
    first = make_ensemble(20, [10, 11], **{"model.mirror": "[True, False]"})
    for mirror, expected in (("[False, True]", [[20, 21]]), ("[True, False]", [[20]]), ("[True, True]", [[20]])):
        second = make_ensemble(21, [12, 13], **{"model.mirror": mirror, schema.BEST_VALIDATION_CERTIFIED: 0.5})
        assert numbers_of(find_rows(*members, first, second, kind="Ensemble (mirrored l_inf-dist Net, ")) == expected


def test_weights_chosen_on_validation_images_do_not_separate_ensembles() -> None:
    members = [make_member(number) for number in (10, 11, 12, 13)]
    weights = ("[2.0, 1.0]", "[1.0, 3.0]")
    for rule, expected in ((f"{RULE}, {schema.CHOSEN_WEIGHTS}", [[20, 21]]), (RULE, [[20]])):
        ensembles = [
            make_ensemble(20, [10, 11], **{"model.weights": weights[0], schema.SELECTION: rule}),
            make_ensemble(21, [12, 13], **{"model.weights": weights[1], schema.SELECTION: rule}),
        ]
        assert numbers_of(find_rows(*members, *ensembles)) == expected


def test_ensembles_of_unknown_members_stay_apart() -> None:
    """Their settings are unknown, so they compete for the row; the command has whole ids."""
    ensembles = [make_ensemble(20, [10, 11]), make_ensemble(21, [12, 13])]
    assert numbers_of(find_rows(*ensembles)) == [[20]]
    (row,) = table_for_names(pd.DataFrame(ensembles), [make_id(20)], quoted=False).rows
    assert row.reproduce_commands == ((ensembles[0][schema.COMMAND], ""),)


def test_members_are_found_by_their_ids_before_export() -> None:
    members = [
        make_member(30, **{schema.ORIGINAL_RUN_ID: make_id(10), "seed": "3"}),
        make_member(31, **{schema.ORIGINAL_RUN_ID: make_id(11), "seed": "4"}),
    ]
    ensemble = make_ensemble(40, [10, 11], **{schema.ORIGINAL_RUN_ID: make_id(20)})
    (row,) = table_for_names(pd.DataFrame([*members, ensemble]), [make_id(20)], quoted=False).rows
    assert row.footnote.startswith("Seed 3+4.")
    assert [command.split()[1] for command, _ in row.reproduce_commands] == ["train", "train", "ensemble"]


def test_members_are_known_even_if_they_are_not_in_the_table() -> None:
    """Members may not meet a filter, have no test results, or have no known command."""
    members = [make_member(number, **{schema.TEST_CERTIFIED: None}) for number in (10, 11, 12, 13)]
    ensembles = [make_ensemble(20, [10, 11]), make_ensemble(21, [12, 13])]
    definition = TABLE.model_copy(update={"measured": MeasuredRows(filters={"model.kind": "ensemble"})})
    (row,) = select_measured(comparison_table(definition, pd.DataFrame([*members, *ensembles])))
    assert row.footnote.startswith("Seeds 0+1, 2+3. Only configuration") and len(row.reproduce_commands) == 6
    members[0][schema.COMMAND] = None
    (row,) = select_measured(comparison_table(definition, pd.DataFrame([*members, *ensembles])))
    assert row.reproduce_commands[0] == (ensembles[0][schema.COMMAND], "") and len(row.reproduce_commands) == 4


def test_members_in_another_order_are_the_same_ensemble() -> None:
    members = [make_member(number) for number in (10, 11, 12)]
    ensembles = [make_ensemble(20, [10, 11]), make_ensemble(21, [11, 10]), make_ensemble(22, [10, 12])]
    (row,) = find_rows(*members, *ensembles)
    assert numbers_of([row]) == [[20, 22]] and "Runs share members" in row.footnote
    expected = ["train", "train", "ensemble", "train", "ensemble"]
    assert [command.split()[1] for command, _ in row.reproduce_commands] == expected
    (row,) = find_rows(*members, make_member(13), make_ensemble(20, [10, 11]), make_ensemble(21, [12, 13]))
    assert "share members" not in row.footnote


def test_settings_that_ensembles_inherit_from_the_first_member_do_not_separate_them() -> None:
    """Members of different kinds in another order, with the settings that `linflab ensemble` logs."""
    kinds = (
        {"model.kind": "linf_dist_mlp", "objective.kind": "hinge", "optimizer.learning_rate": "0.05"},
        {"model.kind": "conv_net", "objective.kind": "worst_case_cross_entropy", "optimizer.learning_rate": "0.002"},
    )
    attacks = ("['pgd', 'surrogate_pgd']", "['pgd', 'targeted_apgd']")
    members = [make_member(10 + number, **kinds[number % 2]) for number in range(4)]
    for rule, weights in ((RULE, "[]"), (f"{RULE}, {schema.CHOSEN_WEIGHTS}", "[2.0, 1.0]")):
        ensembles = []
        for number, order in ((20, [0, 1]), (21, [3, 2])):
            first, second = (kinds[one % 2] for one in order)
            logged = {
                **{path: value for path, value in first.items() if path != "model.kind"},
                "model.members.0.kind": first["model.kind"], "model.members.1.kind": second["model.kind"],
                "model.weights": weights if number == 20 else weights.replace("2.0", "3.0"), schema.SELECTION: rule,
                "evaluation.attack.methods": attacks[0] if number == 20 else "['surrogate_pgd', 'pgd']",
            }  # fmt: skip
            ensembles.append(make_ensemble(number, [10 + one for one in order], **logged))
        assert numbers_of(find_rows(*members, *ensembles, kind="Ensemble (")) == [[20, 21]]
    ensembles[1]["evaluation.attack.methods"] = attacks[1]
    assert numbers_of(find_rows(*members, *ensembles, kind="Ensemble (")) == [[20]]


def test_ensembles_of_sound_members_replace_those_in_real_arithmetic() -> None:
    flags = [{"evaluation.sound": text} for text in ("False", "True")]
    members = [make_member(10 + k, **flags[k // 2]) for k in range(4)]
    ensembles = [
        make_ensemble(20, [10, 11], **flags[0], **{schema.BEST_VALIDATION_CERTIFIED: 0.79}),
        make_ensemble(21, [12, 13], **flags[1]),
    ]
    assert numbers_of(find_rows(*members, *ensembles)) == [[21]]


def test_cpus_and_hardware_are_those_of_the_members() -> None:
    """The hours of an ensemble are those of its members, not of the machine that averaged them."""
    cluster = {"compute.workers": "4", "compute.cpus_per_worker": "8", schema.HARDWARE: "32 CPU cores"}
    laptop = {"compute.workers": "1", "compute.cpus_per_worker": "8", schema.HARDWARE: "8 CPU cores"}
    definition = TABLE.model_copy(update={"columns": ("Method", "Hours", "CPUs")})
    for members, cpus, note in (
        ([make_member(10, **cluster), make_member(11, **cluster)], "32", "hours on 4 workers of 8 CPUs; 32 CPU cores."),
        ([make_member(10, **cluster), make_member(11, **laptop)], "-", "hours; 32 CPU cores; 8 CPU cores."),
        ([make_member(10, **cluster)], "-", "hours; not recorded."),
    ):
        runs = pd.DataFrame([*members, make_ensemble(20, [10, 11], **laptop)])
        rows = select_measured(comparison_table(definition, runs))
        (row,) = (row for row in rows if row.cell("Method").text.startswith("Ensemble"))
        assert row.cell("CPUs").text == cpus and note in row.footnote


def test_ids_of_members_are_neither_labels_nor_groups() -> None:
    members = [make_member(number) for number in (10, 11, 12, 13)]
    runs = pd.DataFrame([*members, make_ensemble(20, [10, 11]), make_ensemble(21, [12, 13])])
    rows = table_for_names(runs, [make_id(20), make_id(21)], quoted=False).rows
    names = [f"Ensemble (2 l_inf-dist Net) (seed={seeds})" for seeds in ("0+1", "2+3")]
    assert [row.cell("Method").text for row in rows] == names
    with pytest.raises(ValueError, match=r"group_by=model\.runs: is not supported"):
        MeasuredRows(group_by=("model.runs",))


def test_ensembles_of_earlier_versions_have_no_weights() -> None:
    """They share a row with later ones of equal weights, whatever the order of their members."""
    members = [make_member(10), make_member(11, **{"model.width": "65"}), make_member(12)]
    ensembles = [make_ensemble(20, [10, 11]), make_ensemble(21, [11, 12])]
    del ensembles[0]["model.weights"]
    assert numbers_of(find_rows(*members, *ensembles)) == [[20, 21]]


def test_given_weights_belong_to_their_members() -> None:
    members = [make_member(10), make_member(11)]
    weights = {"model.weights": "[1.0, 2.0]"}
    ensembles = [make_ensemble(20, [10, 11], **weights), make_ensemble(21, [11, 10], **weights)]
    (row,) = find_rows(*members, *ensembles)
    assert numbers_of([row]) == [[20, 21]] and row.footnote.startswith("Seeds 0+1, 1+0")
