"""Sweeps after runs were deleted in MLflow's UI: every finished trial is trained exactly once."""

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from linflab.platform.config.overrides import load_config, read_recipe
from linflab.platform.data.datasets import load_dataset
from linflab.platform.sweeps.plan import SweepPlan, parse_search_options, plan_sweep
from linflab.platform.sweeps.run import _constant_accuracy
from linflab.platform.sweeps.search import Search, TrialSpec
from linflab.platform.sweeps.store import SweepStore
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.search_spaces.space import load_space
from tests.conftest import RECIPE

pytestmark = pytest.mark.integration

SCORES = {schema.BEST_VALIDATION_CERTIFIED: 0.5, schema.BEST_VALIDATION_CLEAN: 0.6, schema.TRAIN_SECONDS: 1.0}


@pytest.fixture(scope="module")
def plan() -> SweepPlan:
    return plan_sweep(RECIPE, ["training.epochs=1"], "width", "two", parse_search_options("3", sampler="random"), None)


@pytest.fixture(scope="module")
def interrupted_sweep(tmp_path_factory: pytest.TempPathFactory, plan: SweepPlan) -> Storage:
    """The storage of a sweep that was interrupted after two of its three trials."""
    storage = Storage.open(tmp_path_factory.mktemp("recorded") / "runs")
    store = SweepStore.open(plan, storage)
    with store.parent:
        search = store.search(retry_failed=False)
        for _ in range(2):
            train_one(store, search)
    return storage


@pytest.fixture
def storage(tmp_path: Path, interrupted_sweep: Storage) -> Storage:
    """The test's own copy of that storage."""
    shutil.copytree(interrupted_sweep.root, tmp_path / "runs")
    return Storage.open(tmp_path / "runs")


def train_one(store: SweepStore, search: Search) -> TrialSpec:
    job = search.ask()
    assert job is not None
    run_id, refusal = store.begin(job)
    assert not refusal
    for name, value in SCORES.items():
        store.client.log_metric(run_id, name, value)
    store.client.set_terminated(run_id, "FINISHED")
    search.tell(job, SCORES)
    store.log_end(job, None)
    return job


def list_run_ids(client: MlflowClient, kind: str) -> list[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`{schema.KIND}` = '{kind}'", order_by=["attributes.start_time"])
    return [run.info.run_id for run in found]


def hard_delete(client: MlflowClient, run_id: str) -> None:
    """Delete a run permanently, as `mlflow gc` does with deleted runs."""
    client._tracking_client.store._hard_delete_run(run_id)


@pytest.mark.parametrize("deleted", ["parent", "parent and trials", "experiment", "parent for good"])
def test_resume_retrains_no_trial_when_the_sweep_was_deleted(storage: Storage, plan: SweepPlan, deleted: str) -> None:
    client = MlflowClient(storage.tracking_uri)
    (parent,), trials = list_run_ids(client, "sweep"), list_run_ids(client, "trial")
    if deleted == "experiment":
        client.delete_experiment(client.get_run(parent).info.experiment_id)
    else:
        client.delete_run(parent)
        for trial in trials if "trials" in deleted else []:
            client.delete_run(trial)
    if deleted == "parent for good":
        hard_delete(client, parent)
    store = SweepStore.open(plan, storage)
    with store.parent:
        search = store.search(retry_failed=False)
        assert search.results.keys() == {"1", "2"} and all(search.results.values())
        assert train_one(store, search).label == "3" and search.is_finished()
    assert list_run_ids(client, "sweep") == [store.parent.id] and (store.parent.id == parent) == (
        deleted != "parent for good"
    )
    found = list_run_ids(client, "trial")
    assert set(trials) < set(found) and len(found) == 3
    tags = [client.get_run(run).data.tags for run in found]
    assert [tag[schema.TRIAL] for tag in tags] == ["1", "2", "3"]
    assert {tag["mlflow.parentRunId"] for tag in tags} == {store.parent.id}


def test_deleted_trial_counts_toward_the_budget(storage: Storage, plan: SweepPlan) -> None:
    client = MlflowClient(storage.tracking_uri)
    client.delete_run(list_run_ids(client, "trial")[1])
    store = SweepStore.open(plan, storage)
    with store.parent:
        search = store.search(retry_failed=True)
        assert search.results == {"1": client.get_run(list_run_ids(client, "trial")[0]).data.metrics, "2": None}
        assert store.deleted_labels == {"2"} and not store.pending
        assert train_one(store, search).label == "3" and search.is_finished()
    assert len(list_run_ids(client, "trial")) == 2


def test_constant_accuracy_is_the_largest_class_fraction() -> None:
    labels = load_dataset("digits").validation
    fractions = [float((labels.labels[labels.indices] == k).double().mean()) for k in range(10)]
    assert _constant_accuracy(load_config(RECIPE)) == pytest.approx(max(fractions)) and max(fractions) < 0.2


def test_plans_of_large_spaces_are_loaded(tmp_path: Path) -> None:
    space = tmp_path / "large.yaml"
    names = ("model.width", "training.batch_size", "seed", "model.depth")
    parameters = "".join(f"  {name}: {{distribution: integer, low: 1, high: 9000}}\n" for name in names)
    points = "".join(f"  - {{{', '.join(f'{name}: {k}' for name in names)}}}\n" for k in range(1, 1101))
    space.write_text(f"description: large\nparameters:\n{parameters}initial_points:\n{points}")
    loaded = load_space(str(space))
    recipe = read_recipe(RECIPE)
    base = load_config(RECIPE)
    plan = SweepPlan("large", RECIPE, (), recipe, base, loaded, parse_search_options("3"))
    storage = Storage.open(tmp_path / "runs")
    plan.save(storage)
    assert SweepPlan.load(storage, "large") == plan
