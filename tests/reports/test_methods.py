"""Names of methods, and labels that distinguish runs of the same name."""

from pathlib import Path

import pandas as pd
import pytest

from linflab.platform.config.overrides import load_config, recipe_names
from linflab.reports.comparison import MeasuredRows, comparison_table, table_for_names
from linflab.reports.labels import differing_settings, distinguish
from linflab.reports.methods import describe_method, method_name
from tests.reports.runs import TABLE, make_run, select_measured

NET, RELU = "digits_eps0.1_linf_dist_net", "digits_eps0.1_ibp"
HYBRID = ["model.kind=linf_dist_hybrid", "model.backbone.kind=linf_dist_mlp", "model.backbone.width=8",
          "model.hidden_size=8",
          "objective.kind=worst_case_cross_entropy", "objective.eps_train=0.1"]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "overrides", "method"),
    [
        (NET, [], "l_inf-dist Net"),
        (NET, ["model.width=8", "seed=3"], "l_inf-dist Net"),
        (NET, ["model.kind=sort_net", "model.q=0.7"], "SortNet"),
        (NET, ["model.kind=linf_dist_conv_net", "model.width=8", "model.hidden_size=64"],
         "l_inf-dist Net (convolutional)"),
        (NET, HYBRID, "l_inf-dist Net+MLP"),
        (RELU, [], "IBP"),
        (RELU, ["objective.bound=crown_ibp"], "CROWN-IBP"),
        (RELU, ["objective.bound=crown_ibp_fused"], "CROWN-IBP (loss fusion)"),
        (RELU, ["objective.bound=dual", "objective.warmup_reg_weight=0"], "CAP"),
        (RELU, ["objective.bound=hybrid_zonotope", "objective.warmup_reg_weight=0"], "DiffAI"),
        (RELU, ["objective.kind=adversarial_cross_entropy"], "PGD"),
        (RELU, ["objective.kind=cross_entropy"], "Standard"),
        *((RELU, [f"objective.kind={kind}"], kind.upper().replace("_", "-")) for kind in ("sabr", "mtl_ibp", "cc_ibp",
                                                                                         "exp_ibp")),
        (NET, [*HYBRID, "objective.kind=exp_ibp"], "l_inf-dist Net+MLP (EXP-IBP)"),
        (RELU, ["objective.kind=taps"], "TAPS"),
        (NET, [*HYBRID, "objective.kind=taps"], "l_inf-dist Net+MLP (TAPS)"),
        (RELU, ["objective.kind=pvt"], "after PVT"),
        (RELU, ["objective.kind=cross_entropy", "method=ours"], "ours"),
        (NET, ["model={kind: ensemble, mirror: [true], members: [{kind: sort_net}]}"], "Ensemble (mirrored SortNet)"),
        (NET, ["model={kind: ensemble, mirror: [true, false, true], members: [{kind: sort_net}, {kind: sort_net}, "
               "{kind: sort_net}]}"], "Ensemble (2 mirrored SortNet, SortNet)"),
        (NET, ["model={kind: ensemble, members: [{kind: sort_net}, {kind: linf_dist_hybrid}, {kind: sort_net}, "
               "{kind: cnn7}]}"], "Ensemble (cnn7, l_inf-dist Net+MLP, 2 SortNet)"),
        ("mnist_eps0.3_linf_dist_net_v2", ["training.epochs=3"], "l_inf-dist Net (v2)"),
        ("mnist_eps0.3_linf_dist_net_v2", ["objective.kind=hinge"], "l_inf-dist Net"),
    ],
)  # fmt: skip
def test_method_follows_from_the_kinds(recipe: str, overrides: list[str], method: str) -> None:
    assert load_config(recipe, overrides).method == method


def test_method_of_a_recipe_without_one_is_derived(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "dataset: digits\neps: 0.1\nmodel: {kind: cnn7, width: 8, hidden_size: 64}\n"
        "objective: {kind: worst_case_cross_entropy, eps_train: 0.1}\ntraining: {epochs: 1, batch_size: 64}\n"
    )
    assert load_config(str(file)).method == "IBP"
    assert load_config(str(file), ["objective.bound=crown_ibp"]).method == "CROWN-IBP"


@pytest.mark.parametrize("recipe", recipe_names())
def test_shipped_recipes_name_the_method_that_they_train(recipe: str) -> None:
    experiment = load_config(recipe)
    assert experiment.method.removesuffix(" (v2)") == method_name(experiment.to_flat_dict())


PGD = {"model.kind": "conv_net", "objective.kind": "adversarial_cross_entropy"}
IBP = {"model.kind": "conv_net", "objective.kind": "worst_case_cross_entropy", "objective.bound": "ibp"}


def test_stored_name_of_other_kinds_includes_the_derived_name() -> None:
    assert describe_method(IBP, "IBP") == "IBP" and describe_method(PGD, "ours") == "ours"
    assert describe_method(PGD, "IBP").startswith("PGD ") and "IBP" in describe_method(PGD, "IBP")
    assert describe_method({}, "IBP") == "IBP" and describe_method(IBP, None) == "IBP"


@pytest.mark.parametrize("by", [("method",), ("model.width",)])
def test_rows_of_different_kinds_are_not_merged(by: tuple[str, ...]) -> None:
    kinds = [
        PGD, IBP, {**IBP, "objective.bound": "crown_ibp"}, {**IBP, "model.kind": "cnn7"},
        {"model.kind": "sort_net", "objective.kind": "hinge"},
        {"model.kind": "linf_dist_mlp", "objective.kind": "hinge"},
        {**IBP, "model.kind": "linf_dist_hybrid", "model.backbone.kind": "linf_dist_mlp"},
        {**IBP, "model.kind": "linf_dist_hybrid", "model.backbone.kind": "sort_net"},
    ]  # fmt: skip
    runs = [make_run(k, 0.7 + k / 100, 0.6, method="mine", **settings) for k, settings in enumerate(kinds)]  # type: ignore[arg-type]
    table = comparison_table(TABLE.model_copy(update={"measured": MeasuredRows(group_by=by)}), pd.DataFrame(runs))
    rows = select_measured(table)
    assert len(rows) == len(kinds) and all(len(row.runs) == 1 for row in rows)
    labels = [row.cell("Method").text for row in rows]
    assert len(set(labels)) == len(kinds), labels


def test_compared_rows_of_one_name_show_how_they_differ() -> None:
    runs = [make_run(k, 0.7, 0.6, **{"model.width": str(width)}) for k, width in enumerate((8, 16))]
    rows = select_measured(table_for_names(pd.DataFrame(runs), [f"{k:032x}" for k in range(2)], quoted=False))
    assert [row.cell("Method").text.partition("(")[2] for row in rows] == ["width=8)", "width=16)"]
    ids = [str(k) * 32 for k in range(3)]
    runs = [make_run(k, 0.7, 0.6, run_id=ids[k], seed=str(seed)) for k, seed in enumerate((0, 0, 1))]
    rows = select_measured(table_for_names(pd.DataFrame(runs), ids, quoted=False))
    assert len({row.cell("Method").text for row in rows}) == 3


def test_rows_are_distinguished_by_few_settings() -> None:
    rows = [
        {"a.x": str(k % 2), "a.y": str(k), "compute.workers": str(k), "method": str(k), "same": 1} for k in range(4)
    ]
    assert set(differing_settings(rows)) == {"a.x", "a.y"}
    assert distinguish(["n"] * 4, rows) == [f"n (y={k})" for k in range(4)]
    assert distinguish(["n", "m", "n", "k"], rows) == ["n (y=0)", "m", "n (y=2)", "k"]
    assert distinguish(["n", "n"], [{}, {}]) == ["n", "n"]
    values = "0.12344", "0.12341", "0.3", "1e-3"
    labels = distinguish(["n"] * 4, [{"x": value} for value in values])
    assert labels == ["n (x=0.12344)", "n (x=0.12341)", "n (x=0.3)", "n (x=0.001)"]


def test_rows_with_different_attacks_have_no_best_cell() -> None:
    def list_emphases(column: str, **other: object) -> list[str]:
        runs = [make_run(1, 0.7, 0.6, **PGD), make_run(2, 0.7, 0.65, **{**IBP, **other})]
        rows = select_measured(table_for_names(pd.DataFrame(runs), [f"{k:032x}" for k in (1, 2)], quoted=False))
        return [row.cell(column).emphasis for row in rows]

    better = {"test/robust_accuracy": 0.9}
    assert list_emphases("Robust", **better) == ["", "best"]
    assert list_emphases("Robust", **better, **{"linflab.attacks": "PGD (100 steps)"}) == ["", ""]
    assert list_emphases("Certified") == ["", "best"]
    assert list_emphases("Certified", **{"linflab.certifier": "ibp-sound"}) == ["", ""]


def test_comparison_notes_rows_with_different_attacks() -> None:
    def count_notes(attack: str) -> int:
        runs = [make_run(1, 0.7, 0.6), make_run(2, 0.7, 0.65, **{**IBP, "linflab.attacks": attack})]
        return len(table_for_names(pd.DataFrame(runs), [f"{k:032x}" for k in (1, 2)], quoted=False).notes)

    assert count_notes("PGD (100 steps)") == count_notes("PGD (20 steps)") + 1


@pytest.mark.parametrize(
    ("net", "overrides", "method"),
    [
        ("", ["training.epochs=2"], "mine"),
        ("", ["model.hidden_size=8"], "mine"),
        ("", ["model.backbone.kind=linf_dist_mlp"], "mine"),
        ("", ["model.backbone.kind=sort_net"], "SortNet+MLP"),
        ("backbone: {kind: sort_net}, ", ["training.epochs=2"], "mine"),
        ("backbone: {kind: sort_net}, ", ["model.backbone.kind=linf_dist_mlp"], "l_inf-dist Net+MLP"),
    ],
)
def test_stated_method_is_kept_while_the_kinds_stay(
    tmp_path: Path, net: str, overrides: list[str], method: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"method: mine\ndataset: digits\neps: 0.1\nmodel: {{kind: linf_dist_hybrid, {net}hidden_size: 16}}\n"
        "objective: {kind: worst_case_hinge, eps_train: 0.1}\ntraining: {epochs: 1, batch_size: 64}\n"
    )
    assert load_config(str(file)).method == "mine"
    assert load_config(str(file), overrides).method == method
