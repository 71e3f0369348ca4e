"""Time and memory of `linflab report` on tracking stores with many generated runs.

    python benchmarks/report_scale.py [--runs 1000 2000 5000 10000]

One short run is real. The other runs are copies of its rows in the database, with different settings, datasets, seeds
and accuracies. Half of the runs are trials of one sweep. The others belong to no sweep; three of them with different
seeds share a configuration. Each report is a separate process. The column `less import` excludes the import time, which
is the time of a report without runs. The benchmark prints a table and appends each line to report_scale.csv.
"""

import argparse
import csv
import json
import platform as machine
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from linflab.platform.config.overrides import load_config
from linflab.platform.host import describe_hardware, package_versions
from linflab.platform.tracking.storage import Storage
from linflab.platform.trial import TrialRequest, run_trial
from linflab.reports import schema

RECIPE = "digits_eps0.1_linf_dist_net"
SETTINGS = (("mnist", "0.3"), ("fashion_mnist", "0.1"), ("cifar10", repr(8 / 255)))
SEARCHED = ("model.width", "objective.theta", "optimizer.learning_rate", "p_schedule.start", "p_schedule.end")
REPORTS = (["table1"], ["sweep", "big"], ["--all"])
TABLES = ("runs", "params", "tags", "latest_metrics", "metrics")


def generate(storage: Storage, runs: int) -> None:
    """Write the given number of runs into the storage, as copies of a real one."""
    experiment = load_config(RECIPE, ["training.epochs=3", "evaluation.attack.steps=2"])
    tags = {schema.KIND: "trial", schema.COMMAND: f"linflab train {RECIPE}"}
    run_trial(TrialRequest(experiment, storage, "template", tags))
    with sqlite3.connect(storage.database) as database:
        (template,) = database.execute("SELECT run_uuid FROM runs").fetchone()
        rows = {}
        for table in TABLES:
            cursor = database.execute(f"SELECT * FROM {table} WHERE run_uuid = ?", (template,))
            names = [column[0] for column in cursor.description]
            rows[table] = [dict(zip(names, row, strict=True)) for row in cursor]
        copies: dict[str, list[tuple[object, ...]]] = {table: [] for table in TABLES}
        for number in range(runs):
            for table, new_rows in _copy(rows, number, runs // 2).items():
                copies[table] += [tuple(row.values()) for row in new_rows]
        for table, values in copies.items():
            slots = ", ".join("?" for _ in values[0])
            database.executemany(f"INSERT INTO {table} VALUES ({slots})", values)
        for table in reversed(TABLES):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (template,))


def _copy(rows: dict[str, list[dict]], number: int, sweep_size: int) -> dict[str, list[dict]]:
    generator, name = random.Random(number), uuid.UUID(int=number + 1).hex
    point = {path: round(generator.uniform(1, 100), 6) for path in SEARCHED}
    certified = generator.uniform(0.5, 0.8)
    metrics = {
        schema.TEST_CERTIFIED: certified,
        schema.TEST_ROBUST: certified + 0.02,
        schema.TEST_CLEAN: certified + 0.1,
        schema.BEST_VALIDATION_CERTIFIED: certified + generator.gauss(0, 0.01),
        schema.BEST_VALIDATION_CLEAN: generator.uniform(0.6, 0.9),
    }
    is_in_sweep = number < sweep_size
    dataset, eps = SETTINGS[1] if is_in_sweep else SETTINGS[number // 3 % 3]
    settings = {"dataset": dataset, "eps": eps, "seed": "0" if is_in_sweep else str(number % 3)}
    settings_generator = random.Random(number if is_in_sweep else number // 3)  # three seeds per configuration
    settings |= {path: str(round(settings_generator.uniform(1, 100), 6)) for path in SEARCHED}
    tags = {}
    if is_in_sweep:
        job = {"number": number + 1, "params": point, "rung": 1, "seed_index": 0}
        tags = {schema.SWEEP: "big", schema.TRIAL: str(number + 1), schema.TRIAL_SPEC: json.dumps(job)}
        tags |= {schema.SEARCHED_SETTINGS: ",".join(SEARCHED), schema.OBJECTIVES: "certified"}
    new: dict[str, list[dict]] = {table: [{**row, "run_uuid": name} for row in rows[table]] for table in TABLES}
    for table, values in (("params", settings), ("latest_metrics", metrics), ("metrics", metrics)):
        for row in new[table]:
            row["value"] = values.get(row["key"], row["value"])
    new["tags"] += [{"key": key, "value": value, "run_uuid": name} for key, value in tags.items()]
    return new


# A small process starts each report, since the peak memory of a forked process includes its parent's until exec.
WATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def measure(storage: Path, arguments: list[str]) -> tuple[float, float]:
    """Return the seconds and peak MiB of a report."""
    with tempfile.TemporaryDirectory() as out:
        command = [str(Path(sys.executable).with_name("linflab")), "report", *arguments]
        command += ["--storage", str(storage), "--output-dir", out]
        process = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True, check=True)
        seconds, memory = map(float, process.stdout.split())
        return seconds, memory


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1000, 2000, 5000, 10000])
    counts = parser.parse_args().runs
    print(f"{describe_hardware()}; {package_versions()}\n")
    print(f"{'runs':>6}  {'report':10}  {'seconds':>8}  {'less import':>11}  {'MiB':>6}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        empty_storage = Path(folder) / "nothing"
        imports = min(measure(empty_storage, ["table1"])[0] for _ in range(2))
        for count in counts:
            storage = Storage.open(Path(folder) / str(count))
            generate(storage, count)
            for report in REPORTS:
                seconds, memory = measure(storage.root, report)
                name = " ".join(report)
                print(f"{count:6}  {name:10}  {seconds:8.1f}  {seconds - imports:11.1f}  {memory:6.0f}", flush=True)
                rows.append([count, name, round(seconds, 2), round(seconds - imports, 2), round(memory)])
            shutil.rmtree(storage.root)
    path = Path(__file__).with_suffix(".csv")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["date", "machine", "runs", "report", "seconds", "less_import", "mib"])
        for row in rows:
            writer.writerow(
                [time.strftime("%Y-%m-%d"), f"{describe_hardware()}, python {machine.python_version()}", *row]
            )


if __name__ == "__main__":
    main()
