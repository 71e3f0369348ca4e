"""Runs as returned by `read_runs`, and a table definition for them."""

from linflab.reports import schema
from linflab.reports.comparison import TableDefinition
from linflab.reports.tables import Row, Table


def make_run(number: int, validation: float | None, certified: float | None, **other: object) -> dict[str, object]:
    """Return a finished run with these validation and test accuracies."""
    return {
        "run_id": f"{number:032x}", "status": "FINISHED", "start_time": number, "dataset": "fashion_mnist",
        "eps": "0.1",
        "method": "l_inf-dist Net", "seed": "0", "model.width": "64", "training.include_validation": "False",
        schema.EPOCHS: "25", schema.METHOD: "l_inf-dist Net", schema.COMMAND: f"linflab train r seed={number}",
        schema.HARDWARE: "2 CPU cores", schema.CERTIFIER: "lipschitz", schema.ATTACK: "PGD (20 steps)",
        schema.BEST_VALIDATION_CERTIFIED: validation, schema.TEST_CERTIFIED: certified, schema.TEST_CLEAN: 0.85,
        schema.TEST_ROBUST: 0.79, schema.TEST_VIOLATIONS: 0, schema.FLOPS: 1.2e6, schema.TRAIN_SECONDS: 3600.0,
        schema.TEST_CERTIFIED_REAL: None, "compute.workers": "1", "compute.cpus_per_worker": "2", **other,
    }  # fmt: skip


TABLE = TableDefinition.model_validate(
    {"title": "t", "groups": [{"dataset": "fashion_mnist", "eps": 0.1}], "quoted": ["zhang2021_table1"]}
)


def select_measured(table: Table) -> list[Row]:
    return [row for row in table.rows if row.origin == "measured"]
