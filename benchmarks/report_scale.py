"""What reports cost as the record grows: seconds and memory of `linflab report` on generated records.

    python benchmarks/report_scale.py [--runs 1000 2000 5000 10000]

One short training is real; its record is copied in the database, with other settings, data sets, seeds, accuracies.
Half of the runs are the trials of one sweep, half are single trainings of three seeds each. A report is a process of
its own, as users start it; the time to import is that of a report on no records. Prints a table and appends a row for
each line of it to report_scale.csv.
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

from linflab.platform.config import load_experiment
from linflab.platform.storage import Storage
from linflab.platform.tracking import hardware, versions
from linflab.platform.trial import run_trial
from linflab.reports import schema

RECIPE = "digits_eps0.1_linf_dist_net"
SETTINGS = (("mnist", "0.3"), ("fashion_mnist", "0.1"), ("cifar10", repr(8 / 255)))
SEARCHED = ("model.width", "objective.theta", "optimizer.learning_rate", "p_schedule.start", "p_schedule.end")
REPORTS = (["table1"], ["sweep", "big"], ["--all"])
TABLES = ("runs", "params", "tags", "latest_metrics", "metrics")


def generate(storage: Storage, runs: int) -> None:
    """Records of so many runs, made of a real one."""
    experiment = load_experiment(RECIPE, ["training.epochs=3", "evaluation.attack.steps=2"])
    run_trial(experiment, storage, "template", {schema.KIND: "trial", schema.COMMAND: f"linflab train {RECIPE}"})
    with sqlite3.connect(storage.database) as database:
        (template,) = database.execute("SELECT run_uuid FROM runs").fetchone()
        rows = {}
        for table in TABLES:
            found = database.execute(f"SELECT * FROM {table} WHERE run_uuid = ?", (template,))
            names = [column[0] for column in found.description]
            rows[table] = [dict(zip(names, row, strict=True)) for row in found]
        copies: dict[str, list[tuple[object, ...]]] = {table: [] for table in TABLES}
        for number in range(runs):
            for table, changed in _copy(rows, number, runs // 2).items():
                copies[table] += [tuple(row.values()) for row in changed]
        for table, values in copies.items():
            slots = ", ".join("?" for _ in values[0])
            database.executemany(f"INSERT INTO {table} VALUES ({slots})", values)
        for table in reversed(TABLES):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (template,))


def _copy(rows: dict[str, list[dict]], number: int, in_sweep: int) -> dict[str, list[dict]]:
    chance, name = random.Random(number), uuid.UUID(int=number + 1).hex
    point = {path: round(chance.uniform(1, 100), 6) for path in SEARCHED}
    certified = chance.uniform(0.5, 0.8)
    metrics = {
        schema.TEST_CERTIFIED: certified,
        schema.TEST_ROBUST: certified + 0.02,
        schema.TEST_CLEAN: certified + 0.1,
        schema.BEST_VALIDATION_CERTIFIED: certified + chance.gauss(0, 0.01),
        schema.BEST_VALIDATION_CLEAN: chance.uniform(0.6, 0.9),
    }
    swept = number < in_sweep
    dataset, eps = SETTINGS[1] if swept else SETTINGS[number // 3 % 3]
    settings = {"dataset": dataset, "eps": eps, "seed": "0" if swept else str(number % 3)}
    chosen = random.Random(number if swept else number // 3)  # three seeds of one setting
    settings |= {path: str(round(chosen.uniform(1, 100), 6)) for path in SEARCHED}
    tags = {}
    if swept:
        job = {"number": number + 1, "point": point, "round": 1, "repeat": 0}
        tags = {schema.SWEEP: "big", schema.TRIAL: str(number + 1), schema.JOB: json.dumps(job)}
        tags |= {schema.SEARCHED: ",".join(SEARCHED), schema.OBJECTIVES: "certified"}
    new: dict[str, list[dict]] = {table: [{**row, "run_uuid": name} for row in rows[table]] for table in TABLES}
    for table, values in (("params", settings), ("latest_metrics", metrics), ("metrics", metrics)):
        for row in new[table]:
            row["value"] = values.get(row["key"], row["value"])
    new["tags"] += [{"key": key, "value": value, "run_uuid": name} for key, value in tags.items()]
    return new


# started from a small process: a process counts the memory of the one that it was forked from, before it became itself
WATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def measure(storage: Path, arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a report."""
    with tempfile.TemporaryDirectory() as out:
        command = [str(Path(sys.executable).with_name("linflab")), "report", *arguments]
        command += ["--storage", str(storage), "--out", out]
        done = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True, check=True)
        seconds, memory = map(float, done.stdout.split())
        return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1000, 2000, 5000, 10000])
    counts = parser.parse_args().runs
    print(f"{hardware()}; {versions()}\n")
    print(f"{'runs':>6}  {'report':10}  {'seconds':>8}  {'less import':>11}  {'MiB':>6}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        nothing = Path(folder) / "nothing"
        imports = min(measure(nothing, ["table1"])[0] for _ in range(2))
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
            writer.writerow([time.strftime("%Y-%m-%d"), f"{hardware()}, python {machine.python_version()}", *row])


if __name__ == "__main__":
    main()
