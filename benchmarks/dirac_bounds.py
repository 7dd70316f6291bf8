"""How much of a known epsilon bounds recover with Dirac canaries, by the number of coins.

    python -m benchmarks.dirac_bounds

The strongest attack there is on the demo's DP-SGD, simulated exactly: what a bound misses of the accountant's epsilon
where all iterates are seen is the bound's own loss. Each game is audited with guesses chosen on another game of as
many coins.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.markdown import markdown
from benchmarks.measure import processor
from metacanary import accounting, audits, dirac, runs, store

RESULTS = Path(__file__).resolve().parent / "results" / "dirac_bounds.csv"
SEED = 1000
EPSILON, DELTA = 8.0, 1e-5
MECHANISM = {"sampling_prob": 0.2, "num_steps": 200}
AUDITORS = ["steinke", "fdp_gaussian", "gaussian_rates", "order_statistic_gaussian"]
GAMES = {100: 200, 1_600: 20, 10_000: 10, 50_000: 5}
"""Games by the number of coins."""


def game(seed: int, num_coins: int, noise_multiplier: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The coins of a game, and the scores of both observers."""
    coins = runs.coins(seed, num_coins, "independent")
    seen = dirac.observations(seed, coins, num_others=0, noise_multiplier=noise_multiplier, **MECHANISM)
    prob = MECHANISM["sampling_prob"]
    ratio = dirac.all_iterates(seen, noise_multiplier=noise_multiplier, sampling_prob=prob)
    return coins, {"all": ratio, "last": dirac.last_iterate(seen)}


def measure(games: dict[int, int], seed: int = SEED) -> pd.DataFrame:
    """Mean bounds by number of coins, observer and auditor, with their spread over games."""
    sigma = accounting.noise_multiplier(epsilon=EPSILON, delta=DELTA, **MECHANISM)
    rows = []
    for num_coins, num_games in games.items():
        for number in tqdm(range(num_games), desc=f"{num_coins} coins", unit="game"):
            first = seed + 2 * number
            (coins, seen), (other, chosen) = (game(first + i, num_coins, sigma) for i in (0, 1))
            for observer, scores in seen.items():
                found = audits.audit(
                    scores,
                    coins,
                    delta=DELTA,
                    surrogates=(chosen[observer], other),
                    auditors=AUDITORS,
                    protocol="surrogate",
                )
                rows += [
                    {"num_coins": num_coins, "observer": observer, "auditor": name, "epsilon": epsilon}
                    for name, epsilon in found[["auditor", "epsilon_lower"]].itertuples(index=False)
                ]
    by = pd.DataFrame(rows).groupby(["auditor", "num_coins", "observer"], sort=False)["epsilon"]
    return by.agg(epsilon="mean", deviation="std", games="count").reset_index()


def table(measured: pd.DataFrame) -> str:
    """The section of docs/ledger.md: a row for each auditor, a column for each number of coins."""
    first = measured.iloc[0]
    cells = measured.assign(error=measured["deviation"] / np.sqrt(measured["games"]))
    cells["cell"] = [f"{mean:.2f} ± {error:.2f}" for mean, error in cells[["epsilon", "error"]].to_numpy()]
    wide = cells.pivot(index=["auditor", "num_coins"], columns="observer", values="cell")
    both = (wide["all"] + " (" + wide["last"] + ")").unstack("num_coins").reindex(AUDITORS)
    games = measured.drop_duplicates("num_coins").set_index("num_coins")["games"]
    both.columns = [f"{num_coins:,}" for num_coins in both.columns]
    both.insert(0, "auditor", both.index.map("`{}`".format))
    played = ", ".join(f"{count} of {num_coins:,}" for num_coins, count in games.items())
    return (
        f"Means over games ± one standard error, in brackets the last iterate; games by number of coins: {played}. "
        f"`python -m benchmarks.dirac_bounds`, {first['processor']}, seed {first['seed']}, {first['date']}.\n\n"
        f"{markdown(both)}"
    )


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    measured = measure(GAMES).assign(seed=SEED, processor=processor(), date=date.today())
    store.write_text(args.output, measured.to_csv(index=False))


if __name__ == "__main__":
    main()
