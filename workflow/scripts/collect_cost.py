"""Collects what jobs cost: history.csv, and the provenance of models, scores and audits -> cost.csv."""

from _job import running

from metacanary import comparison_cost, store

if __name__ == "__main__":
    with running(snakemake) as job:
        rows = [
            comparison_cost.job(
                rule,
                cell,
                store.read_provenance(path),
                store.read_csv(path) if rule == comparison_cost.OPTIMIZATION else None,
            )
            for rule, cells in job.settings["jobs"].items()
            for path, cell in zip(job.input[rule], cells, strict=True)
        ]
        store.write_csv(job.output.cost, comparison_cost.table(rows), job.provenance())
