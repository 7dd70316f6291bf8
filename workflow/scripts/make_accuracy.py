"""Makes the table of accuracy against epsilon: summary/epsilon.csv, cost.csv -> accuracy.csv, .md, .tex."""

from _job import running

from metacanary import accuracy_table, store

if __name__ == "__main__":
    with running(snakemake) as job:
        table = accuracy_table.collect(
            store.read_csv(job.input.summary),
            {name: job.settings["trainings"][name] for name in job.settings["order"]},
            canary=job.settings["canary"],
            costs=store.read_csv(job.input.cost),
        )
        accuracy_table.write(table, *job.output, provenance=job.provenance())
        print(accuracy_table.markdown(table))
