#!/usr/bin/env bash
# %%
# # A table for a paper
#
# Make a LaTeX table of your runs next to published results. The runs of this tutorial are those that linflab ships, so
# it needs no training.
#
# Import the shipped runs, as you would import the runs of a colleague:
linflab runs import "$(python -c 'from linflab.reports import papers; print(papers.__path__[0])')/measured.jsonl"

# %%
# ## Define the table
#
# A YAML file names the datasets, the columns, the published sources, and which runs belong to a row. Rows are means
# over seeds. Of each method, the configuration with the best validation accuracy is shown, never the best on test
# images. The filter below keeps only runs that were trained on the validation images as well, as in the papers. These
# have no validation accuracy, so the latest configuration of each method is shown.
cat > table.yaml <<'YAML'
title: Networks for two CPU cores
columns: [Method, FLOPs, Clean, Robust, Certified, Runs]
groups: [{dataset: fashion_mnist, eps: 0.1}]
quoted: [zhang2021_table1]
measured:
  group_by: [method]
  filters: {training.include_validation: true}
YAML
linflab report table table.yaml --output-dir tables > log.txt
ls tables

# %%
# ## LaTeX
#
# The file compiles by itself, and its table can be pasted into a paper. It uses booktabs and graphicx.
sed -n '/begin{tabular}/,/end{tabular}/p' tables/table-table.tex

# %%
# ## Next
#
# - [Compare methods over seeds](../how-to/compare.md) trains recipes and gives confidence intervals.
# - [Browse and report](../how-to/report.md) has all options of a table.
