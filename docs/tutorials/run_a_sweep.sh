#!/usr/bin/env bash
# %%
# # Run a sweep
#
# Tune settings with Optuna on Ray Tune, interrupt and extend the sweep, and read its report.
#
# A search space names the settings that vary. This one is short; [the format](../how-to/search-spaces.md) has
# conditions, bounds by other settings, and initial points.
cat > space.yaml <<'YAML'
description: Width and target radius
parameters:
  model.width: {distribution: integer, low: 32, high: 96, step: 32}
  objective.theta: {distribution: uniform, low: 0.15, high: 0.3}
YAML
linflab space show space.yaml

# %%
# ## Start
#
# Three trials of 5 epochs. All trials share the seed and the validation images, which rank them.
linflab sweep digits_eps0.1_linf_dist_net space.yaml training.epochs=5 evaluation.attack.steps=10 \
    evaluation.attack.restarts=1 --budget 3 --name small > log.txt
linflab sweeps

# %%
# ## Resume and extend
#
# After Ctrl-C or a crash, `--resume` trains what is missing; with a larger budget, it adds trials.
linflab sweep --resume small --budget 4 > log.txt
linflab sweeps

# %%
# ## Read the report
#
# The report has one row per trial, a plot of certified over clean accuracy, and the effect of each setting. It is
# written as Markdown, LaTeX, HTML and CSV.
linflab report sweep small --output-dir report > log.txt
head -12 report/*small.md

# %%
# ## Next
#
# - `--halving 9` spends most epochs on the best configurations; see
#   [Successive halving](../concepts/successive-halving.md).
# - `--objectives certified,clean,flops` gives a Pareto front.
# - The same command with `--cluster` runs on [a cluster](../how-to/cluster.md).
