"""Audits a file of membership scores from any source: `python -m metacanary.audits FILE --delta DELTA`."""

import argparse
import hashlib
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import metacanary
from metacanary import accounting, audit_options, auditors, audits, heuristics, score_file, store
from metacanary.protocols import Options

_WIDTH = 110
_FEW = 0.5  # where perfect guesses of the worst case end below, the number of canaries is the news, not the attack


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits a file, writes the report, then prints it.

    Args:
      arguments: Of the command line; None for those of the process.

    Returns:
      The exit status: 0, or 1 after one line on standard error that says what was wrong; then nothing is written or
      printed on standard output.
    """
    options = audit_options.parser().parse_args(arguments)
    output = options.output or options.file.with_suffix(".audit.json")
    try:
        table, report = _audited(options)
        _write(output, report, [path for path in (options.file, options.surrogates) if path])
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{_text(table, report)}\n\nWritten to {output}")
    return 0


def _audited(options: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Audits a file under every protocol asked for: the table of bounds, and what is written."""
    asked = audit_options.protocols(options)
    declared = _declared(options, asked)
    data = score_file.read(options.file)
    accounted = _accounted(options, "add_remove" if data.pairs is None else "replace_one")
    table = _bounds(options, asked, data)
    report = {
        "metacanary": metacanary.__version__,
        "file": str(options.file),
        "sha256": _digest(options.file),
        "delta": options.delta,
        "significance": options.significance,
        "declared": declared,
        "num_scores": data.scores.size,
        "num_runs": max(1, len(data.runs)),
        "runs": list(data.runs),
        "multi_run": data.multi_run,
        "accounted": accounted,
        "bounds": json.loads(table.to_json(orient="records", double_precision=15)),
    }
    return table, report


def _declared(options: argparse.Namespace, asked: Sequence[str]) -> dict[str, Any]:
    """What is fixed before the scores are looked at; None where no protocol takes it, or for a protocol's own."""
    told = {}
    for name, takers in audit_options.TAKEN_BY.items():
        value = getattr(options, name)
        told[name] = (getattr(Options, name) if value is None else value) if set(takers) & set(asked) else None
    if told["surrogates"]:
        told["surrogates"] = {"file": str(options.surrogates), "sha256": _digest(options.surrogates)}
    return {"protocols": list(asked), "auditors": [a.name for a in auditors.select(options.auditors)], **told}


def _bounds(options: argparse.Namespace, asked: Sequence[str], data: score_file.Scores) -> pd.DataFrame:
    """The bounds of each protocol, under the file's names of runs."""
    given = {name: getattr(options, name) for name in audit_options.TAKEN_BY if getattr(options, name) is not None}
    if options.surrogates:
        given["surrogates"] = score_file.surrogates(score_file.read(options.surrogates), data)
    shared = {
        "delta": options.delta,
        "significance": options.significance,
        "pairs": data.pairs,
        "multi_run": data.multi_run,
        "auditors": options.auditors,
    }
    frames = []
    for protocol in asked:
        own: dict[str, Any] = {name: value for name, value in given.items() if protocol in audit_options.TAKEN_BY[name]}
        try:
            frames.append(audits.audit(data.scores, data.included, protocol=protocol, **shared, **own))
        except ValueError as error:
            raise ValueError(f"protocol {protocol}: {error}") from None
    table = pd.concat(frames, ignore_index=True)
    if "run" in table:
        table["run"] = table["run"].map(
            {audits.POOLED: audits.POOLED} | {str(k): name for k, name in enumerate(data.runs)}
        )
    return table


def _accounted(options: argparse.Namespace, adjacency: str) -> dict[str, float | None] | None:
    """What is claimed of the mechanism, None if it was not described."""
    described = {name: getattr(options, name) for name in ("noise_multiplier", "sampling_prob", "num_steps")}
    if all(value is None for value in described.values()):
        return None
    missing = [name for name, value in described.items() if value is None]
    if missing:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(f"{names} missing, expected --noise-multiplier, --sampling-prob and --num-steps together")
    mechanism = described | {"delta": options.delta, "adjacency": adjacency}
    claims = {
        "epsilon_pld": accounting.epsilon(**mechanism, accountant="pld"),
        "epsilon_rdp": accounting.epsilon(**mechanism, accountant="rdp") if adjacency == "add_remove" else None,
        "epsilon_last_iterate_heuristic": heuristics.last_iterate_epsilon(**mechanism),
    }
    return {name: None if value == math.inf else value for name, value in claims.items()}


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(output: Path, report: Mapping[str, Any], inputs: Sequence[Path]) -> None:
    """Writes the report, but over no file that was read."""
    if output.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"--output is {output}, expected another file than those of scores")
    try:
        store.write_json(output, report)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror}") from None


def _text(table: pd.DataFrame, report: Mapping[str, Any]) -> str:
    """What is printed: the file, the bounds, and what is claimed beside them."""
    kind = "adding or removing one record" if table["adjacency"].iloc[0] == "add_remove" else "replacing one record"
    head = (
        f"{report['file']}: {report['num_scores']} scores of {_named(report)}. Lower bounds on epsilon at delta "
        f"{report['delta']:g} for {kind}, each at significance {report['significance']:g} under its assumption."
    )
    rows = _summarised(table) if "run" in table else table
    lines = [head, _shown(rows).to_string(index=False)]
    if report["accounted"]:
        claims = ", ".join(f"{k} {'inf' if v is None else f'{v:.3f}'}" for k, v in report["accounted"].items())
        lines.append(f"Claimed of the mechanism: {claims}. The heuristic is no bound.")
    lines += _notes(rows)
    return "\n\n".join(text if "\n" in text else textwrap.fill(text, _WIDTH) for text in lines)


def _named(report: Mapping[str, Any]) -> str:
    """The runs, by name where they are few."""
    number, names = report["num_runs"], report["runs"]
    if number == 1:
        return f"run {names[0]}" if names else "1 run"
    listed = f"{', '.join(names[:6])}{', ...' if number > 6 else ''}"
    return f"{number} runs ({listed}){', each with one coin' if report['multi_run'] else ''}"


def _summarised(table: pd.DataFrame) -> pd.DataFrame:
    """The pooled rows, with the mean and the median over runs of each bound."""
    keys = ["protocol", "auditor"]
    pooled = table["run"] == audits.POOLED
    single = table[~pooled].groupby(keys, sort=False)["epsilon_lower"].agg(["mean", "median"])
    return table[pooled].join(single, on=keys)


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns that are printed, as text."""
    several = "mean" in rows
    return pd.DataFrame(
        {
            "protocol": rows["protocol"],
            "auditor": rows["auditor"],
            "assumption": rows["assumption"],
            **({name: rows[name].map("{:.3f}".format) for name in ("mean", "median")} if several else {}),
            "pooled >=" if several else "epsilon >=": rows["epsilon_lower"].map("{:.3f}".format),
            "at most": rows["ceiling"].map("{:.2f}".format),
            "coins": rows["num_canaries"],
            "guesses (IN)": [f"{n} ({k})" for n, k in zip(rows["num_guesses"], rows["num_guesses_in"], strict=True)],
            "right": rows["num_correct"],
            "AUROC": rows["auroc"].map("{:.3f}".format),
        }
    )


def _notes(rows: pd.DataFrame) -> list[str]:
    """What must be known to read the table."""
    notes = [
        "Each row is a statement of its own: decide on one before looking; the largest of several holds at no stated "
        "level."
    ]
    if "mean" in rows:
        notes.append(
            "Mean and median are of the bounds of single runs, and hold at no stated level. Pooled is the bound of all "
            "coins as one game; the columns from it on are those of that game."
        )
    if (rows["assumption"] == "none").any():
        notes.append("Rows with assumption none are no bounds: their number of guesses was chosen on the same scores.")
    worst = rows.loc[rows["assumption"] == "worst_case", "ceiling"]
    if rows["ceiling"].max() < 0.005 or (len(worst) and worst.max() < _FEW):
        kind, most = ("worst_case ", worst.max()) if len(worst) else ("", rows["ceiling"].max())
        notes.append(
            f"So few canaries and guesses cannot show more: with all guesses right the largest {kind}bound would be "
            f"{most:.2f}. A low bound here says nothing about privacy."
        )
    return notes
