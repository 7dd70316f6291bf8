# Entry point: `snakemake --cores 2 --configfile config/digits.yaml`, or without --configfile the paper's values.
from snakemake.utils import min_version

min_version("9.27.1")


# Only when no other is given: the nested keys of two config files would merge.
if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/canaries.smk"
include: "workflow/rules/metasmoothness.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/tan.smk"
include: "workflow/rules/audit.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/comparisons.smk"
include: "workflow/rules/accuracy.smk"
include: "workflow/rules/ledger.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/bundle.smk"


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        TARGETS["tables"] + TARGETS["figures"] + TARGETS["report_page"],
    localrule: True


# Named targets: canaries, models, audits, bundle, tables, table1, table2, figures, figure1, figure2; metasmoothness if
# the config lists variants for it, pretrained if it has pretrainings, tan if it names a training to search settings for,
# comparisons and comparison_NAME for each that it has, accuracy and ledger if it names trainings
# for them.
for target, files in TARGETS.items():

    rule:
        name:
            target
        input:
            files,
        localrule: True
