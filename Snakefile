# Optimal Brain Restoration, from raw models to tables and figures.
#
#   snakemake --cores all                                        the paper's tables and figures
#   snakemake --cores all --config 'experiments=[joint]'         a study; config/README.md lists them
#   snakemake --cores all results/tables/table1.csv              one table
#   snakemake --cores all --config 'only_models=[llama-2-7b]'    one model
#   snakemake -n                                                 what would run, and why
from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from obr.config.config_files import DEFINITIONS, experiment_files
from obr.errors import ObrError

min_version("9.10")


# Each file is laid over those before it, and files named with --configfile over all of them.
for file in DEFINITIONS:

    configfile: str(file)


configfile: f"{workflow.basedir}/config.yaml"


try:
    experiments = experiment_files(config)
except ObrError as error:
    raise WorkflowError(str(error)) from None

for file in experiments:

    configfile: str(file)


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
    prepare()


rule all:
    default_target: True
    input:
        jobs.everything,
