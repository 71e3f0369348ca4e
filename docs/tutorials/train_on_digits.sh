#!/usr/bin/env bash
# %%
# # Train an l_inf-dist net on digits
#
# Train a network that is certified by its own margin, on the command line. Every run is logged to MLflow.
#
# A recipe is a file with all settings. `describe` shows them, the layers and the cost of a step:
linflab describe digits_eps0.1_linf_dist_net | tail -8

# %%
# ## Train
#
# An override changes one setting. Ctrl-C is safe at any time: the same command with `--resume` continues.
linflab train digits_eps0.1_linf_dist_net training.epochs=20 evaluation.attack.steps=20 --name first | tail -4

# %%
# ## Change a setting
#
# A wider network. `--tag` marks runs that belong together.
linflab train digits_eps0.1_linf_dist_net model.width=128 training.epochs=20 evaluation.attack.steps=20 \
    --name wide --tag campaign=widths | tail -4

# %%
# ## Look at the runs
#
# `linflab runs` lists them with the settings in which they differ, and `linflab ui` opens MLflow.
linflab runs

# %%
# ## Evaluate at other radii
#
# A network of the first run, certified and attacked at three radii. No certified image may be broken by an attack.
linflab evaluate first --eps 0.05,0.1,0.15 evaluation.attack.steps=20

# %%
# ## Next
#
# - [Run a sweep](run_a_sweep.md) tunes the settings.
# - [The p schedule](../concepts/p-schedule.md) explains why accuracy rises late in training.
