"""The names of tags, parameters and metrics of a run: the platform writes them, the reports read them.

Parameters are the settings of the experiment by dotted path. Accuracies are shares in [0, 1].
"""

# parameters that reports ask for by name
EPOCHS = "training.epochs"

# tags
SWEEP = "linflab.sweep"  # name of the sweep: on its parent run and on every trial
KIND = "linflab.kind"  # "sweep" (a parent run) or "trial" (a trained network)
LAUNCH = "linflab.launch"  # the same for all runs that one command started
BUDGET = "linflab.budget"  # of a sweep: "20 trials", "1.5 hours"
SAMPLER = "linflab.sampler"
OBJECTIVES = "linflab.objectives"  # what the sweep optimizes, comma-separated: on its parent run and on every trial
TRIAL = "linflab.trial"  # name of the trial within its sweep: 7, 7.2 in a race's second round, 7-seed3 as a repetition
JOB = "linflab.job"  # the same as JSON: number, point, round, repeat
ASKED = "linflab.asked"  # when the search proposed the trial, in milliseconds by a clock that is never set back
TOLD = "linflab.told"  # when it was told what the trial came to: samplers learn in this order
STARTS = "linflab.starts"  # after which epochs processes began to train the run, launches apart: "0,3|5"
RECIPE = "linflab.recipe"
METHOD = "linflab.method"
COMMAND = "linflab.command"  # repeats the run
SEARCHED = "linflab.searched"  # dotted paths of the settings that the sweep varies, comma-separated
CERTIFIER = "linflab.certifier"  # what the certified accuracies are by; with -sound, rounding is accounted for
ATTACK = "linflab.attack"  # what the robust accuracy is under, in words
SELECTION = "linflab.selection"  # which epoch's network was kept, and by what
FAILURE = "linflab.failure"  # why a run failed, one line
IMPORTED = "linflab.imported"  # the id that the run had where its record was exported
EXPERIMENT = "linflab.experiment"  # a digest of all settings: the same for repetitions of one experiment
HARDWARE = "linflab.hardware"
HOST = "linflab.host"  # the name of the machine that trained it last
VERSIONS = "linflab.versions"
COMMIT = "mlflow.source.git.commit"  # of linflab's own code; the UI has it as the source's version
NOTE = "mlflow.note.content"  # what the UI shows as a run's description, Markdown

# metrics of an epoch
P = "train/p"
LEARNING_RATE = "train/learning_rate"
CROSS_ENTROPY_WEIGHT = "train/cross_entropy_weight"
TRAIN_EPS = "train/eps"  # of the worst case; 0 for objectives without one
TRAIN_LOSS = "train/loss"
EPOCH_SECONDS = "train/epoch_seconds"
VALIDATION_CLEAN = "val/clean_accuracy"
VALIDATION_CERTIFIED = "val/certified_accuracy"

# metrics of the network that was kept (see SELECTION)
BEST_EPOCH = "best/epoch"
BEST_VALIDATION_CLEAN = "best/val/clean_accuracy"
BEST_VALIDATION_CERTIFIED = "best/val/certified_accuracy"
TEST_CLEAN = "test/clean_accuracy"
TEST_ROBUST = "test/robust_accuracy"
TEST_CERTIFIED = "test/certified_accuracy"
TEST_CERTIFIED_EXACT = "test/certified_accuracy_in_exact_arithmetic"  # beside a sound one
TEST_BROKEN = "test/certified_but_broken"  # samples; above 0 the certifier is unsound
FLOPS = "model/flops"
PARAMETERS = "model/parameters"
TRAIN_SECONDS = "train/seconds"

OBJECTIVE_METRICS = {  # what a sweep can optimize: its metric, and whether more is better
    "certified": (BEST_VALIDATION_CERTIFIED, True),
    "clean": (BEST_VALIDATION_CLEAN, True),
    "flops": (FLOPS, False),
}

# metrics of a sweep
SWEEP_SECONDS = "sweep/seconds"  # spent so far, over all launches

# artifacts
EXPERIMENT_FILE = "experiment.yaml"
WEIGHTS_FILE = "weights.pt"
MODEL = "model"  # the name of a run's logged model: mlflow.pytorch.load_model("runs:/RUN_ID/model")
FIGURES_FOLDER = "figures"
MARGINS_FILE = "training_margins.csv"  # in it: image, half its margin in pixels
RADII_FILE = "radii.csv"  # in it: test image, its certified radius in pixels
REPORT_FOLDER = "report"  # of a sweep: its table and figures
SCORES_FOLDER = "scores"  # of every scoring again, by its number: a folder
