"""Makes the table of model variants: measurements and histories -> metasmoothness.csv, .md, .tex."""

from _job import running

from metacanary import metasmoothness_table, store

if __name__ == "__main__":
    with running(snakemake) as job:
        table = metasmoothness_table.collect(
            job.settings["variants"],
            [*map(store.read_csv, job.input.measured)],
            [*map(store.read_csv, job.input.histories)],
            num_averaged=job.settings["num_averaged"],
        )
        metasmoothness_table.write(table, *job.output, provenance=job.provenance())
        print(metasmoothness_table.markdown(table))
