"""Makes the ledger of epsilon: summary/epsilon.csv, audits of Dirac canaries -> ledger.csv, .md, .tex."""

from _job import running

from metacanary import ledger, store, summary

if __name__ == "__main__":
    with running(snakemake) as job:
        table = ledger.collect(
            store.read_csv(job.input.summary),
            summary.collect(map(store.read_csv, job.input.dirac)),
            trainings=job.settings["order"],
            canaries=job.settings["canaries"],
            auditor=job.settings["auditor"],
            protocol=job.settings["protocol"],
        )
        ledger.write(table, *job.output, provenance=job.provenance())
        print(ledger.markdown(table))
