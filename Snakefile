# Optimal Brain Restoration, from raw models to tables and figures.
#
#   snakemake --cores all                                   everything in config.yaml
#   snakemake --cores all results/tables/table1.csv         one table
#   snakemake --cores all --config only_models=[llama-2-7b]   # one model
#   snakemake -n                                            what would run, and why
from snakemake.utils import min_version

min_version("9.10")


# Another file, named with --configfile, stands in for config.yaml instead of being mixed with it.
if "models" not in config:

    configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/download.smk"
include: "workflow/rules/rotations.smk"
include: "workflow/rules/calibration.smk"
include: "workflow/rules/mixed_precision.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/kernels.smk"
include: "workflow/rules/report.smk"


onstart:
    check_writable()


rule all:
    default_target: True
    input:
        jobs.everything,
