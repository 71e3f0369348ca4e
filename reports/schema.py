"""Names of the tags, parameters and metrics of a run, which the platform writes and the reports read.

Parameters are the settings of the config by dotted path. Accuracies are fractions in [0, 1].
"""

# Parameters that reports use by name.
EPOCHS = "training.epochs"

# Tags.
SWEEP = "linflab.sweep"  # name of the sweep, on its parent run and its trials
KIND = "linflab.kind"  # "sweep" (parent run) or "trial" (training run)
INVOCATION_ID = "linflab.invocation_id"  # shared by all runs of one command
SLURM_JOB = "linflab.slurm_job"  # number of the batch job that started a training, with that of the array task
BUDGET = "linflab.budget"  # of a sweep, such as "20 trials" or "1.5 hours"
SAMPLER = "linflab.sampler"
OBJECTIVES = "linflab.objectives"  # comma-separated, on parent run and trials
TRIAL = "linflab.trial"  # name of a trial in its sweep: 7, 7.2 (second rung), 7-seed3 (seed replicate)
TRIAL_SPEC = "linflab.trial_spec"  # JSON: number, params, rung, seed_index
ASK_TIME = "linflab.ask_time_ms"  # when the sampler proposed the trial, by a monotonic clock
TELL_TIME = "linflab.tell_time_ms"  # when the sampler got the result; samplers learn in this order
START_EPOCHS = "linflab.start_epochs"  # epochs done when each process started; | separates invocations: "0,3|5"
RECIPE = "linflab.recipe"
MEMBERS = "linflab.members"  # of an ensemble: comma-separated ids of the runs whose networks it averages
METHOD = "linflab.method"
COMMAND = "linflab.command"  # reproduces the run
MODULES = "linflab.modules"  # modules outside linflab with parts of the run, comma-separated
SEARCHED_SETTINGS = "linflab.searched_settings"  # dotted paths, comma-separated
CERTIFIER = "linflab.certifier"  # with the suffix SOUND, rounding is included
ATTACK = "linflab.attacks"  # description of the attacks behind the robust accuracy
TEST_VERIFICATION = "linflab.test_verification"  # description of the evaluation behind TEST_VERIFIED
SELECTION = "linflab.model_selection"  # rule that selected the epoch
VERIFICATION = "linflab.verification"  # description of the verification behind VERIFIED_VALIDATION
MISSING = "linflab.missing"  # what `linflab train` has not logged yet; removed when all is logged
FAILURE = "linflab.failure_reason"  # reason in one line
ORIGINAL_RUN_ID = "linflab.original_run_id"  # id before export and import
CONFIG_HASH = "linflab.config_hash"  # hash of all settings
HARDWARE = "linflab.hardware"
HOST = "linflab.hostname"  # machine of the latest process
VERSIONS = "linflab.versions"
USER_TAG = "linflab.tag."  # prefix of user tags: linflab.tag.KEY
NAME = "mlflow.runName"  # set by the user; by default, recipe and overrides
COMMIT = "mlflow.source.git.commit"  # commit of linflab, which MLflow shows as source version
DESCRIPTION = "mlflow.note.content"  # Markdown, which MLflow shows as description

# Metrics of an epoch.
P = "train/p"
LEARNING_RATE = "train/learning_rate"
CROSS_ENTROPY_WEIGHT = "train/cross_entropy_weight"
TRAIN_EPS = "train/eps"  # eps of the worst-case loss; 0 without this loss
TRAIN_LOSS = "train/loss"
EPOCH_SECONDS = "train/epoch_seconds"
VALIDATION_CLEAN = "val/clean_accuracy"
VALIDATION_CERTIFIED = "val/certified_accuracy"

# Metrics of the selected model (see SELECTION).
BEST_EPOCH = "best/epoch"
BEST_VALIDATION_CLEAN = "best/val/clean_accuracy"
BEST_VALIDATION_CERTIFIED = "best/val/certified_accuracy"
VERIFIED_VALIDATION = "best/val/verified_accuracy"  # certified by the cascade, for the best trials of a sweep
TEST_CLEAN = "test/clean_accuracy"
TEST_ROBUST = "test/robust_accuracy"
TEST_CERTIFIED = "test/certified_accuracy"
TEST_CERTIFIED_REAL = "test/certified_accuracy_real_arithmetic"  # logged if TEST_CERTIFIED is sound
TEST_VIOLATIONS = "test/certificate_violations"  # number of images; above 0, the certifier is unsound
TEST_VERIFIED = "test/verified_accuracy"  # certified by complete or cascade at eps of the run; see TEST_VERIFICATION
FLOPS = "model/flops"
PARAMETERS = "model/parameters"
TRAIN_SECONDS = "train/seconds"

CHOSEN_WEIGHTS = "with weights chosen on validation images"  # end of SELECTION of such an ensemble

SOUND = "-sound"  # suffix of certifiers that account for float32 rounding

OBJECTIVE_METRICS = {  # by objective of a sweep: metric, and whether higher is better
    "certified": (BEST_VALIDATION_CERTIFIED, True),
    "clean": (BEST_VALIDATION_CLEAN, True),
    "flops": (FLOPS, False),
}

# Metrics of a sweep.
SWEEP_SECONDS = "sweep/seconds"  # elapsed over all invocations

# Artifacts.
CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "weights.pt"
MODEL = "model"  # logged model, an exported graph
FIGURES_DIR = "figures"
MARGINS_FILE = "training_margins.csv"  # columns: image, half margin for pixel values in [0, 1]
RADII_FILE = "radii.csv"  # per test image: certified_radius, label, prediction, robust_eps_EPS
REPORT_DIR = "report"  # table and figures of a sweep
EARLIER_EVALUATIONS_DIR = "scores"  # used instead of EVALUATIONS_DIR in runs of earlier versions
EVALUATIONS_DIR = "evaluations"  # one numbered folder per later evaluation
