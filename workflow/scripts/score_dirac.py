"""Scores Dirac canaries in the runs of a training, which are not trained for it -> scores.csv, runs.csv."""

from _job import running

from metacanary import accounting, dirac, store

if __name__ == "__main__":
    with running(snakemake) as job:
        settings = job.settings
        mechanism = {name: settings[name] for name in ("sampling_prob", "num_steps")}
        budget = {name: settings[name] for name in ("delta", "accountant")}
        noise = accounting.noise_multiplier(epsilon=float(settings["epsilon"]), **mechanism, **budget)
        scores, runs = dirac.score_tables(
            settings["runs"],
            settings["roles"],
            settings["seeds"],
            num_canaries=settings["num_canaries"],
            num_others=settings["num_others"],
            noise_multiplier=noise,
            **mechanism,
        )
        provenance = job.provenance(seed=settings["seeds"])
        store.write_csv(job.output.runs, runs, provenance)
        store.write_csv(job.output.scores, scores, provenance)
