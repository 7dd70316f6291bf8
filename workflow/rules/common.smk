# For all rules: the checked config, paths and wildcards, targets, and what a result depends on.
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

SCRIPTS = Path(workflow.basedir, "workflow", "scripts")
sys.path.insert(0, str(SCRIPTS))

import _check
import _checkpoints
import _config
import _config_error
import _slurm_plugin
import _sources
import _stages
from metacanary import bundle_layout, store

try:
    validate(config, "../schemas/config.schema.yaml")
    _check.check(config)
except (WorkflowError, ValueError) as error:
    # Not raised, since Snakemake would add the places in this file that it passed through.
    sys.exit(f"config error: {_config_error.one_line(error)}")


_slurm_plugin.mend()

# A shell that SIGTERM ended would leave its script to be killed before the checkpoint is written.
shell.prefix("trap : TERM; ")


onsuccess:
    _checkpoints.discard_finished(Path(config["results_dir"], "checkpoints"))


STAGES = _stages.Stages(config)
CELL = "{dataset}/{canary}/{training}/eps{epsilon}"


pathvars:
    results=config["results_dir"],
    data=config["data_dir"],
    logs="<results>/logs",
    benchmarks="<results>/benchmarks",
    cell=CELL,


wildcard_constraints:
    dataset=_config.either(STAGES.datasets),
    canary=_config.either(config["canaries"]["kinds"]),
    training=_config.either(config["trainings"]),
    pretraining=_config.either(config["pretrainings"]),
    epsilon=r"inf|[0-9.e-]+",
    block=r"\d+",
    trial=r"(search|scaling)\d+|prediction|full",
    comparison=_config.either(config["comparisons"]),


KINDS = config["canaries"]["kinds"]
OPTIMIZED = [name for name in KINDS if KINDS[name]["family"] in _config.OPTIMIZED]
PLAIN = [name for name in KINDS if name not in OPTIMIZED]
VARIANTS = config["metasmoothness"]["canaries"]


def sources(script):
    """Digests the code of a script and of all modules that it imports, without comments and docstrings."""
    return store.code_digest(_sources.sources(SCRIPTS / script, Path(workflow.basedir, "metacanary")))


def settings(stage):
    """Makes a params function: all settings that a stage's result depends on."""
    return lambda wildcards: STAGES.settings(stage, **dict(wildcards.items()))


def config_digest(stage):
    """Makes a params function: the digest of these settings."""
    return lambda wildcards: STAGES.digest(stage, **dict(wildcards.items()))


def checkpoints(stage):
    """Makes a params function: the folder for a job's checkpoints, which are no declared output."""
    return lambda wildcards: str(Path(config["results_dir"], "checkpoints", stage, *wildcards))


def stored_dataset(wildcards):
    """An input function: the finished marker of the data set, which all subsets of it share."""
    return f"{config['data_dir']}/{STAGES.datasets[wildcards.dataset]}/provenance.json"


def pretraining_dataset(wildcards):
    """An input function: the finished marker of the data set of a pretraining."""
    return f"{config['data_dir']}/{config['pretrainings'][wildcards.pretraining]['dataset']}/provenance.json"


def pretrained_model(wildcards):
    """An input function: the model that a training starts from, if it names a pretraining."""
    name = config["trainings"][wildcards.training]["pretraining"]
    return [] if name is None else f"{config['results_dir']}/pretrained/{name}/model.npz"


def scaled(amount):
    """Makes a resources function: the amount in the first attempt, twice and three times it in those after."""
    return lambda wildcards, attempt: amount * attempt


def in_cells(pattern):
    """Fills a path with every cell of the matrix."""
    return list(dict.fromkeys(pattern.replace("<cell>", CELL).format(**cell) for cell in STAGES.cells()))


def in_blocks(pattern, cell):
    """Fills a path with a cell and every block of it."""
    blocks = STAGES.blocks(cell["training"])
    return [pattern.replace("<cell>", CELL).format(**cell, block=block) for block in blocks]


def of_cell(pattern):
    """Makes an input function: a path for every block of the job's cell."""
    return lambda wildcards: in_blocks(pattern, dict(wildcards.items()))


def of_variants(pattern):
    """Fills a path with every variant whose metasmoothness is measured."""
    return [pattern.format(**variant) for variant in STAGES.variants()]


def of_trials(pattern):
    """Fills a path with every trial of the search of settings."""
    return [pattern.format(**trial) for trial in STAGES.trials()]


def of_costs(rule, pattern):
    """Fills a path with every job of a rule whose cost is compared."""
    return [pattern.replace("<cell>", CELL).format(**job) for job in STAGES.costs()[rule]]


def of_ledger(pattern):
    """Fills a path with every training and target epsilon of the ledger."""
    return [pattern.format(**cell) for cell in STAGES.ledger_cells()]


def compared_cost(wildcards):
    """An input function: what jobs cost, for a comparison by cost."""
    by_cost = config["comparisons"][wildcards.comparison]["by"] == "cost"
    return f"{config['results_dir']}/summary/cost.csv" if by_cost else []


def searched_trials(wildcards):
    """An input function: what the settings of a trial are chosen by, if they are."""
    if wildcards.trial not in ("prediction", "full"):
        return []
    return [f"{config['results_dir']}/tan/{wildcards.dataset}/{trial}.csv" for trial in STAGES.searched()]


def bundled(name, pattern):
    """Fills a path with all files of one kind that a bundle holds."""
    return [pattern.replace("<cell>", CELL).format(**wildcards) for wildcards in STAGES.bundled()[name]]


COMPARISONS = [f"comparison_{name}" for name in config["comparisons"]]
ACCURACY = ["accuracy"] if config["accuracy"]["trainings"] else []
LEDGER = ["ledger"] if config["ledger"]["trainings"] else []
METASMOOTHNESS = ["metasmoothness"] if VARIANTS else []
TAN = ["tan"] if config["tan"]["training"] else []
PRETRAINED = collect("<results>/pretrained/{pretraining}/model.npz", pretraining=config["pretrainings"])
TABLES = {
    name: collect("<results>/tables/{n}.{s}", n=name, s=["csv", "md", "tex"])
    for name in ["table1", "table2", "bounds", "reproduction", *ACCURACY, *LEDGER, *METASMOOTHNESS, *TAN, *COMPARISONS]
}
FIGURES = {
    name: collect("<results>/figures/{n}.{s}", n=name, s=["pdf", "png"])
    for name in ["figure1", "figure2", *ACCURACY, *LEDGER, *METASMOOTHNESS, *TAN, *COMPARISONS]
}
BUNDLE = [
    *collect("<results>/bundle/{name}", name=bundle_layout.FILES),
    *bundled("histories", "<results>/bundle/csv/canaries/{dataset}/{canary}/history.csv"),
    *bundled("metasmoothness", "<results>/bundle/csv/metasmoothness/{dataset}/{canary}.csv"),
    *bundled("trials", "<results>/bundle/csv/tan/{dataset}/{trial}.csv"),
    *bundled("cost", "<results>/bundle/csv/summary/cost.csv"),
]
TARGETS = {
    "canaries": in_cells("<results>/canaries/{dataset}/{canary}/canaries.npz"),
    **({"pretrained": PRETRAINED} if PRETRAINED else {}),
    "models": [path for cell in STAGES.cells() for path in in_blocks("<results>/models/<cell>/block{block}.npz", cell)],
    "audits": in_cells("<results>/audits/<cell>/epsilon.csv"),
    "tables": sum(TABLES.values(), []),
    "figures": sum(FIGURES.values(), []),
    "bundle": BUNDLE,
    "report_page": collect("<results>/audits.html"),
    **TABLES,
    **FIGURES,
    **{name: TABLES[name] + FIGURES[name] for name in ACCURACY + LEDGER + METASMOOTHNESS + TAN + COMPARISONS},
    **({"comparisons": sum([TABLES[name] + FIGURES[name] for name in COMPARISONS], [])} if COMPARISONS else {}),
}
