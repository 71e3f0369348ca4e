"""`linflab slurm` on a real Slurm: two simulated compute nodes and a login node."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_runs, read_trials
from tests.conftest import RECIPE
from tests.platform.cluster.hosts import find_missing_requirements
from tests.platform.cluster.slurm import CPUS, SlurmCluster, find_missing_daemons

pytestmark = pytest.mark.slurm
TRIALS = 8
SHORT = ["training.checkpoint_interval=1", "evaluation.attack.steps=5", "evaluation.attack.restarts=1"]
SWEEP = [RECIPE, "demo", *SHORT, "training.epochs=20", "--budget", str(TRIALS), "--sampler", "random"]
TRAINING = [RECIPE, *SHORT, "training.epochs=30", "compute.workers=2", f"compute.cpus_per_worker={CPUS}"]
TIMES = {schema.TRAIN_SECONDS, schema.EPOCH_SECONDS}
