"""Makes the table of what was trained at which total noise: trials -> tan.csv, .md, .tex."""

from _job import running

from metacanary import store, tan_table

if __name__ == "__main__":
    with running(snakemake) as job:
        table = tan_table.collect(job.settings["trials"], [*map(store.read_csv, job.input.trials)])
        tan_table.write(table, *job.output, provenance=job.provenance())
        print(tan_table.markdown(table))
