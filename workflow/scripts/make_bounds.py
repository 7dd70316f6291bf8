"""Makes the table of all bounds: summary/epsilon.csv -> bounds.csv, bounds.md, bounds.tex."""

from _job import running

from metacanary import store, tables

if __name__ == "__main__":
    with running(snakemake) as job:
        options = {name: job.settings[name] for name in ("protocol", "score")}
        table = tables.bounds(store.read_csv(job.input.summary), **options)
        tables.write(table, *job.output, provenance=job.provenance())
        print(tables.text(table))
