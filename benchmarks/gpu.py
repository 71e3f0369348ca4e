"""Test, time, profile and train on a CUDA device with one command, in a few minutes of GPU time.

    make gpu ARGS="[--out DIR] [--minutes M] [--stages NAME ...] [--recipe RECIPE] [--set SETTING=VALUE ...]"

Five stages run one after the other. Each one has a time limit and a log of its own, and the failure of a stage does
not stop the next one:

- environment: device, driver, and versions of the packages.
- tests: the checks of the CUDA kernels (tests/models/cuda_checks.py).
- kernels: distance_gpu.py, which times each kernel, `torch.cdist` and a matrix product.
- profile: 30 training steps under `torch.profiler`, ten each at the first p, at the middle p and at p = inf.
- train: a training run of the recipe in the remaining time. The run is stopped with SIGTERM, so it leaves a checkpoint
  to resume.

DIR (default: build/gpu) receives a log per stage, kernels.csv, profile.csv, trace.json.gz, the storage directory of the
run, and summary.md. Without the recipe's dataset in LINFLAB_DATA, the profile and the run use random images of the same
shape, and the summary reports this. Times on random images are valid, accuracies are not.

The script needs PyTorch with CUDA, Triton, pydantic and PyYAML, and the stage `tests` needs pytest. The script runs
from a checkout, without an installation. The stage `train` also needs the packages of the extra `platform`. On a
machine without a GPU, `--device cpu` tries out only the stages `profile` and `train`.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("environment", "tests", "kernels", "profile", "train")
LIMITS_S = {"environment": 30, "tests": 150, "kernels": 120, "profile": 90}  # the first use of a kernel compiles it
STOP_S = 20  # time that a run needs to write its last checkpoint
MIN_TRAIN_S = 30
WARMUP_STEPS, PROFILED_STEPS = 3, 10
COLUMNS = ("p", "step_ms", "device_ms", "kernels", "copies", "copy_ms", "host_share")


@dataclass
class Report:
    """Outcome of each stage.

    Attributes:
        out: Directory of all files.
        deadline: Time at which all stages must be done, in seconds of `time.monotonic`.
        lines: Lines of the summary by stage.
    """

    out: Path
    deadline: float
    lines: dict[str, list[str]] = field(default_factory=dict)

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, stage: str, command: list[str], limit: float, **variables: str) -> int | None:
        """Run a command with its output in STAGE.log; return its exit status, or None after a timeout."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}
        start = time.monotonic()
        with (self.out / f"{stage}.log").open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                status: int | None = process.wait(timeout=max(1.0, limit))
            except subprocess.TimeoutExpired:
                status = None
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        outcome = "stopped at its time limit" if status is None else "done" if status == 0 else f"FAILED ({status})"
        self.lines.setdefault(stage, []).append(f"{outcome} after {time.monotonic() - start:.0f} s")
        return status

    def write(self) -> None:
        """Write summary.md with the outcomes of all stages so far."""
        text = ["# GPU run", ""]
        for stage, lines in self.lines.items():
            text += [f"## {stage}", "", *lines, ""]
        (self.out / "summary.md").write_text("\n".join(text))


def random_images(recipe: str, settings: list[str], out: Path) -> bool:
    """Write random images if the recipe's dataset is missing; return True if it is missing."""
    import numpy as np

    from linflab.platform.config.overrides import load_config
    from linflab.platform.data.datasets import dataset_info, load_dataset
    from linflab.platform.errors import InputError

    config = load_config(recipe, settings)
    try:
        load_dataset(config.dataset)
        return False
    except InputError:
        pass
    info, generator = dataset_info(config.dataset), np.random.default_rng(0)
    folder = out / "random_images" / config.dataset
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 60_000), ("test", 10_000)):
        images = generator.integers(0, 256, (count, *info.input_shape), dtype=np.uint8)
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", generator.integers(0, info.classes, count))
    os.environ["LINFLAB_DATA"] = str(folder.parent)
    return True


def tests_summary(path: Path) -> str:
    """Return the counts of a JUnit file, and the names of failed tests."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case.get("name") for case in cases if {child.tag for child in case} & {"failure", "error"}]
    skipped = sum(any(child.tag == "skipped" for child in case) for case in cases)
    passed = len(cases) - len(failed) - skipped
    return f"{passed} passed, {skipped} skipped, {len(failed)} failed {' '.join(map(str, failed))}".rstrip()


def as_table(path: Path, columns: list[str] | None = None) -> list[str]:
    """Return the rows of a CSV file as a Markdown table."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = columns or list(rows[0])
    lines = [[row[name] for name in names] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (names, ["--:"] * len(names), *lines)]


def epochs_summary(log: Path) -> str:
    """Return the last progress line of a training log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("epoch")]
    return f"{len(lines)} epochs; last: `{lines[-1].strip()}`" if lines else "no epoch was finished"


def profile(recipe: str, settings: list[str], out: Path) -> None:
    """Profile training steps; write profile.csv and trace.json.gz, and print a table of kernels per p."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from linflab.platform.config.overrides import load_config
    from linflab.platform.data.datasets import load_dataset
    from linflab.platform.training.trainer import Trainer
    from linflab.platform.trial import select_device

    config = load_config(recipe, settings)
    device = select_device(config)
    trainer = Trainer(config, load_dataset(config.dataset, config.augmentation).to(device))
    order = trainer.epoch_order(1)
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    wait = torch.cuda.synchronize if on_device else lambda: None
    with (out / "profile.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, start in enumerate((0, trainer.steps // 2, trainer.steps - PROFILED_STEPS)):
            steps = [max(0, min(start + k, trainer.steps - 1)) for k in range(PROFILED_STEPS)]
            for _ in range(WARMUP_STEPS):
                trainer.step(steps[0], *order)
            wait()
            loop_start = time.perf_counter()
            for step in steps:
                trainer.step(step, *order)
            wait()
            # This time is measured without the profiler, which slows the host down.
            milliseconds = 1e3 * (time.perf_counter() - loop_start) / len(steps)
            with profiler(activities=activities) as recorded_profile:
                for step in steps:
                    trainer.step(step, *order)
                wait()
            events = [event for event in recorded_profile.events() if event.device_type == DeviceType.CUDA]
            copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
            busy = sum(event.time_range.elapsed_us() for event in events) / 1e3 / len(steps)
            copy_ms = sum(event.time_range.elapsed_us() for event in copies) / 1e3 / len(steps)
            kernels = (len(events) - len(copies)) / len(steps)
            host = max(0.0, 1 - busy / milliseconds) if on_device else 1.0
            p = trainer.scheduled_values(steps[0]).p
            row = [
                f"{p:.4g}",
                f"{milliseconds:.3f}",
                f"{busy:.3f}",
                f"{kernels:.0f}",
                f"{len(copies) / len(steps):.1f}",
            ]
            writer.writerow([*row, f"{copy_ms:.3f}", f"{host:.2f}"])
            sort = "self_device_time_total" if on_device else "self_cpu_time_total"
            print(
                f"p = {p:g}: {milliseconds:.2f} ms a step\n"
                f"{recorded_profile.key_averages().table(sort_by=sort, row_limit=20)}"
            )
            if number == 1:
                recorded_profile.export_chrome_trace(str(out / "trace.json.gz"))


def main() -> None:
    """Run the stages of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--recipe", default="mnist_eps0.3_linf_dist_net")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="overrides of the recipe")
    parser.add_argument("--batch", default="512")
    parser.add_argument("--widths", nargs="+", default=["5120", "1024"])
    parser.add_argument("--p", nargs="+", default=[], help="exponents to time; default: all of distance_gpu.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--profile-only", action="store_true", help=argparse.SUPPRESS)  # used by the stage `profile`
    arguments = parser.parse_args()
    settings = [*arguments.set, f"compute.device={arguments.device}"]
    if arguments.profile_only:
        profile(arguments.recipe, settings, arguments.out)
        return
    sys.path.insert(0, str(ROOT))
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: device=cuda: no CUDA device found; use --device cpu to try out profile and training")
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        sys.exit(f"gpu: out={out}: must be empty; use another --out")
    report = Report(out, time.monotonic() + 60 * arguments.minutes)
    stages = [stage for stage in STAGES if stage in arguments.stages]
    if arguments.device == "cpu":
        stages = [stage for stage in stages if stage in ("profile", "train")]
    python, benchmarks = sys.executable, ROOT / "benchmarks"
    if "environment" in stages:
        report.run("environment", ["nvidia-smi"], LIMITS_S["environment"])
        report.run("environment", [python, "-m", "torch.utils.collect_env"], LIMITS_S["environment"])
        report.lines["environment"].append(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        report.write()
    if "tests" in stages:
        junit = out / "tests.xml"
        checks = str(ROOT / "tests" / "models" / "cuda_checks.py")
        pytest = ["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", f"--junit-xml={junit}", checks]
        report.run("tests", [python, *pytest], min(LIMITS_S["tests"], report.seconds_left()))
        if junit.exists():
            report.lines["tests"].append(tests_summary(junit))
        report.write()
    if "kernels" in stages:
        command = [
            python,
            str(benchmarks / "distance_gpu.py"),
            "--by",
            "linflab",
            "tensor_cores",
            "torch.cdist",
            "--batch",
            arguments.batch,
        ]
        exponents = ["--p", *arguments.p] if arguments.p else []
        for width in arguments.widths:
            limit = min(LIMITS_S["kernels"], report.seconds_left())
            report.run("kernels", [*command, "--width", width, *exponents, "--csv", str(out / "kernels.csv")], limit)
        if (out / "kernels.csv").exists():
            columns = ["width", "p", "by", "forward_ms", "training_ms", "of_limit"]
            report.lines["kernels"] += ["", *as_table(out / "kernels.csv", columns)]
        report.write()
    if {"profile", "train"} & set(stages) and random_images(arguments.recipe, arguments.set, out):
        report.lines["data"] = ["The dataset was not found in LINFLAB_DATA: random images of its shape were used."]
    recipe_arguments = [
        "--recipe",
        arguments.recipe,
        "--device",
        arguments.device,
        *(["--set", *arguments.set] if arguments.set else []),
    ]
    if "profile" in stages:
        command = [python, __file__, "--profile-only", "--out", str(out), *recipe_arguments]
        report.run("profile", command, min(LIMITS_S["profile"], report.seconds_left()))
        if (out / "profile.csv").exists():
            report.lines["profile"] += ["", *as_table(out / "profile.csv")]
        report.write()
    if "train" in stages:
        timeout = report.seconds_left() - STOP_S
        if timeout < MIN_TRAIN_S:
            report.lines["train"] = [f"skipped: {report.seconds_left():.0f} s are left"]
        else:
            storage = ["--storage", str(out / "runs")]
            report.run("train", [python, "-m", "linflab", "train", arguments.recipe, *settings, *storage], timeout)
            report.lines["train"].append(epochs_summary(out / "train.log"))
    report.write()
    print((out / "summary.md").read_text())
    print(json.dumps({"out": str(out), "seconds_left": round(report.seconds_left())}))


if __name__ == "__main__":
    main()
