"""Makes the page of all audits: summary/epsilon.csv, scores, canaries.npz, benchmarks -> audits.html."""

from pathlib import Path

import pandas as pd
from _job import running

from metacanary import canaries, job_costs, report_data, report_page, store

CELL = ("dataset", "canary", "training", "epsilon")


def read_scores(job):
    """Reads the score that is shown, a cell after the other."""
    settings, files = job.settings, {}
    names = ("scores", "runs", "population")
    for block, *paths in zip(settings["blocks"], *(job.input[name] for name in names), strict=True):
        files.setdefault(tuple(block[name] for name in CELL), []).append(paths)
    for cell, paths in files.items():
        scores, runs, population = zip(*paths, strict=True)
        yield report_data.cell_scores(
            pd.concat(map(store.read_csv, scores), ignore_index=True),
            pd.concat(map(store.read_csv, runs), ignore_index=True),
            settings["page"]["score"],
            cell=dict(zip(CELL, cell, strict=True)),
            population=[store.read_npz(path)[0] for path in population] if settings["population"] else (),
            **settings["options"],
        )


if __name__ == "__main__":
    with running(snakemake) as job:
        (summary,) = job.input.summary
        pictures = {}
        for kind, path in zip(job.settings["kinds"], job.input.canaries, strict=True):
            arrays, origin = store.read_npz(path)
            pictures[kind["dataset"], kind["canary"]] = (canaries.Canaries.from_arrays(arrays), origin["class_names"])
        page = report_page.render(
            store.read_csv(summary),
            pd.concat(read_scores(job), ignore_index=True),
            pictures,
            job_costs.by_rule({rule: map(Path, paths) for rule, paths in job.params.benchmarks.items()}),
            report_page.Facts(**job.settings["page"], provenance=store.read_provenance(summary)),
        )
        store.write_json(Path(job.output.page).with_suffix(".provenance.json"), job.provenance())
        store.write_text(job.output.page, page)
        print(f"{job.output.page}: {len(page.encode()) / 1e6:.1f} MB")
