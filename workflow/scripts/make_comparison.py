"""Makes the table of a comparison of canary kinds: summary/epsilon.csv, cost.csv -> comparison_*.csv, .md, .tex."""

from _job import running

from metacanary import comparison_table, store

if __name__ == "__main__":
    with running(snakemake) as job:
        kinds, trainings = job.settings["order"]
        table = comparison_table.collect(
            store.read_csv(job.input.summary),
            {name: job.settings["kinds"][name] for name in kinds},
            {name: job.settings["trainings"][name] for name in trainings},
            **{name: job.settings[name] for name in ("by", "auditor", "protocol", "score")},
            costs=store.read_csv(job.input.cost) if job.input.cost else None,
        )
        comparison_table.write(table, *job.output, provenance=job.provenance())
        print(comparison_table.markdown(table))
