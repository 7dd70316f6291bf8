"""Makes table 2: summary/epsilon.csv -> table2.csv, table2.md, table2.tex."""

from _job import running

from metacanary import store, tables

if __name__ == "__main__":
    with running(snakemake) as job:
        options = {name: job.settings[name] for name in ("protocol", "score")}
        table = tables.table2(store.read_csv(job.input.summary), **options)
        table = tables.with_objectives(table, job.settings["objectives"])
        tables.write(table, *job.output, provenance=job.provenance())
        print(tables.text(table))
