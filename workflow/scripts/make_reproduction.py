"""Puts published numbers beside ours: summary/epsilon.csv, published.csv -> reproduction.csv, .md, .tex."""

from _job import running

from metacanary import reproduction, reproduction_forms, store

if __name__ == "__main__":
    with running(snakemake) as job:
        table = reproduction.compare(
            store.read_csv(job.input.summary),
            reproduction.read_published(job.input.published),
            job.settings["setup"],
            protocol=job.settings["protocol"],
            score=job.settings["score"],
        )
        reproduction_forms.write(table, *job.output, provenance=job.provenance())
        print(reproduction_forms.markdown(table))
