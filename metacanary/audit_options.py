"""The command line of `python -m metacanary.audits`: its options, its help, and which protocol takes which option."""

import argparse
from pathlib import Path

from metacanary import auditors
from metacanary.protocols import PROTOCOLS, SPENDING, Options

TAKEN_BY = {
    "num_guesses": ("fixed",),
    "grid": tuple(protocol for protocol in PROTOCOLS if protocol != "fixed"),
    "spending": ("corrected",),
    "surrogates": ("surrogate",),
    "num_splits": ("median",),
    "seed": ("holdout", "median"),
}
"""The protocols that take each option; its name is that of a keyword of `audits.audit`, too."""

DESCRIPTION = """\
Lower bounds on epsilon from membership scores and coins.

FILE is a CSV with a header and one row per canary (and run):
  id        names the canary; each once per run
  included  1 if the canary was in the training set, 0 if not: the coin, fair and independent, flipped before training
  score     higher means more likely included; computed without looking at the coins
  run       optional: the training run, if there are several, each with its own coins and the same canaries;
            where every row (pair) has a run of its own, rows are independent and the bounds assume less
  pair      optional: the pair of a canary, of which exactly one is included; epsilon is then that of replacing a record
Other columns and blank lines are ignored.

Printed is a row per bound; of several runs the mean and median of their bounds, and the bound of all their coins as one
game (pooled). All bounds of all runs, and all that was declared, are written as JSON.
"""
EPILOG = """\
The number of guesses is chosen by a protocol:
  fixed      declared before looking at the scores
  corrected  the best of a grid that was declared before looking; the significance is spent over the grid
  holdout    the best of a grid on one half of the coins, tested on the other half; canaries must not influence each
             other
  median     the median of such bounds over several splits, each at half the significance
  surrogate  the best of a grid on runs that are not audited
  paper      the best of a grid on the same scores, uncorrected: no bound
An option that none of the protocols asked for takes is refused.

Every bound is a statement at the given significance under its assumption:
  worst_case      none beside the rules above
  family          the mechanism's trade-off curve is Gaussian (mu-GDP)
  product         canaries do not influence each other
  family+product  both
  asymptotic      both, and many canaries
  credible        a Bayesian interval, no confidence bound
  none            the number of guesses was chosen on the same scores (protocol paper): no bound at all
Choose one bound before you look: the largest of several holds at no stated level. docs/auditing.md says how to choose.
"""


def parser() -> argparse.ArgumentParser:
    """The command line, its help included.

    Returns:
      A parser; options that only some protocols take (`TAKEN_BY`) are None unless given.
    """
    parser = argparse.ArgumentParser(
        prog="python -m metacanary.audits",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the CSV of scores")
    parser.add_argument("--delta", type=float, required=True, help="where epsilon is bounded, such as 1e-5")
    level = Options.significance
    parser.add_argument("--significance", type=float, default=level, help=f"one minus confidence (default {level})")
    parser.add_argument(
        "--auditors", nargs="+", metavar="NAME", help=f"the bounds (default: all of {', '.join(auditors.NAMES)})"
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="where to write (default: FILE with .audit.json)")
    _add_protocol_options(parser.add_argument_group("how the number of guesses is chosen"))
    mechanism = parser.add_argument_group("DP-SGD that was claimed, to print the accounted epsilon beside the bounds")
    mechanism.add_argument("--noise-multiplier", type=float, help="noise over clip norm")
    mechanism.add_argument("--sampling-prob", type=float, help="of Poisson sampling, in (0, 1]")
    mechanism.add_argument("--num-steps", type=int, help="updates")
    return parser


def _add_protocol_options(group: argparse._ArgumentGroup) -> None:
    """The options of `TAKEN_BY`, and the protocol."""
    group.add_argument(
        "--protocol",
        action="append",
        choices=[*PROTOCOLS, "all"],
        help="see below; may be given several times; all leaves surrogate out without --surrogates (default: fixed "
        "with --num-guesses, surrogate with --surrogates, else corrected)",
    )
    group.add_argument(
        "--num-guesses",
        type=_guesses,
        metavar="N",
        help="for fixed: a number (half of it IN), a fraction of the coins (with a dot: 0.5), or IN,OUT (default: all "
        "canaries, or pairs)",
    )
    group.add_argument(
        "--grid",
        nargs="+",
        type=_guesses,
        metavar="N",
        help="for all but fixed: what to choose from, each as for --num-guesses; holdout and median test half of the "
        "coins (default: m, m/2, m/4, ... while at least 10; for surrogate IN and OUT each; for paper up to all)",
    )
    group.add_argument(
        "--spending",
        choices=SPENDING,
        help=f"for corrected: equal shares of the significance, or 1/2, 1/4, ... in the order of the grid (default "
        f"{Options.spending})",
    )
    group.add_argument(
        "--surrogates",
        type=Path,
        metavar="FILE",
        help="for surrogate: a CSV with the same columns of runs that are not audited, which choose the guesses; of "
        "pairs the same ones",
    )
    group.add_argument("--num-splits", type=int, metavar="N", help=f"for median (default {Options.num_splits})")
    group.add_argument(
        "--seed", type=int, help=f"for holdout and median: of the random splits (default {Options.seed})"
    )


def _guesses(text: str) -> int | float | tuple[int, int]:
    """N, a fraction, or IN,OUT."""
    try:
        if "," not in text:
            return float(text) if "." in text else int(text)
        guessed_in, guessed_out = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected N, a fraction such as 0.5, or IN,OUT") from None
    return guessed_in, guessed_out


def protocols(options: argparse.Namespace) -> list[str]:
    """The protocols asked for.

    Args:
      options: As parsed by `parser`.

    Returns:
      Names in the order of `PROTOCOLS`. Without `--protocol` the one that takes `--num-guesses` or `--surrogates`,
      else "corrected"; "all" is all that can be had, without "surrogate" if there are no surrogates.

    Raises:
      ValueError: If an option was given that none of them takes.
    """
    own = "fixed" if options.num_guesses is not None else "surrogate" if options.surrogates else "corrected"
    asked = set(options.protocol or [own])
    if "all" in asked:
        asked |= set(PROTOCOLS) - (set() if options.surrogates else {"surrogate"})
    for name, takers in TAKEN_BY.items():
        if getattr(options, name) is not None and not asked & set(takers):
            raise ValueError(
                f"--{name.replace('_', '-')} is given under protocol {', '.join(sorted(asked))}, expected only under "
                f"{', '.join(takers)}"
            )
    return [protocol for protocol in PROTOCOLS if protocol in asked]
