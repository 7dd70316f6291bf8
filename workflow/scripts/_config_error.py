"""Errors of a config, each as one line that names the key, its value and what was expected."""

import difflib
import re
from typing import Any

from jsonschema import ValidationError

EXPECTED = {
    "type": "{}",
    "enum": "one of {}",
    "const": "{}",
    "minimum": "a number >= {}",
    "maximum": "a number <= {}",
    "exclusiveMinimum": "a number > {}",
    "exclusiveMaximum": "a number < {}",
    "minItems": "at least {} item(s)",
    "minProperties": "at least {} entry",
    "uniqueItems": "no item twice",
    "pattern": "text that matches {}",
}


def one_line(error: Exception) -> str:
    """Says in one line which key is wrong, what it holds, and what it should hold.

    Args:
      error: From `check`, or from `snakemake.utils.validate`, whose context is a jsonschema.ValidationError.
    """
    cause = error.__context__ if isinstance(error.__context__, ValidationError) else error
    if not isinstance(cause, ValidationError):
        return " ".join(str(error).split())
    where = ".".join(key for key in cause.absolute_path if isinstance(key, str)) or "top level"
    if cause.validator == "additionalProperties":
        return f"{where}: {_unknown(cause)}"
    if cause.validator == "required":
        missing = next(key for key in cause.validator_value if key not in cause.instance)
        return f"{where}: expected a key {missing!r}"
    expected = cause.validator_value
    expected = " or ".join(map(str, expected)) if isinstance(expected, list) else expected
    text = EXPECTED.get(str(cause.validator), "{}").format(expected)
    return f"{where}: got {cause.instance!r}, expected {text}{_yaml_hint(cause.instance)}"


def require(condition: bool, where: str, got: Any, expected: str) -> None:
    """Raises the ValueError of a wrong key."""
    if not condition:
        raise ValueError(f"{where}: got {got!r}, expected {expected}")


def _unknown(error: ValidationError) -> str:
    """Names the unknown key and the known one that is nearest to it."""
    known = {*error.schema.get("properties", {})}
    patterns = error.schema.get("patternProperties", {})
    key = next(k for k in error.instance if k not in known and not any(re.search(p, k) for p in patterns))
    close = difflib.get_close_matches(key, known, n=1)
    if not known:
        return f"got the name {key!r}, expected one that matches {' or '.join(patterns)}"
    return f"unknown key {key!r}, " + (f"did you mean {close[0]!r}?" if close else f"expected {sorted(known)}")


def _yaml_hint(value: Any) -> str:
    """Explains the commonest surprise of YAML: 1e-5 is text, 1.0e-5 a number."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value)
    return f" (YAML takes {value} for text: write {float(value):.1e})" if is_number else ""
