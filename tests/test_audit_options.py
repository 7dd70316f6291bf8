"""The command line's options: what they mean, and which protocols they fit."""

import inspect

import pytest

from metacanary import audit_options, auditors
from metacanary.audits import PROTOCOLS, audit
from metacanary.protocols import Options


def parse(*flags):
    """The options of a command line."""
    return audit_options.parser().parse_args(["a.csv", "--delta", "1e-5", *flags])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ["corrected"]),
        (("--num-guesses", "9"), ["fixed"]),
        (("--surrogates", "b.csv"), ["surrogate"]),
        (("--spending", "geometric"), ["corrected"]),
        (("--protocol", "all"), [p for p in PROTOCOLS if p != "surrogate"]),
        (("--protocol", "all", "--surrogates", "b.csv"), list(PROTOCOLS)),
        (("--protocol", "all", "--num-guesses", "9", "--grid", "8", "9", "--num-splits", "3"), None),
        (("--protocol", "paper", "--protocol", "fixed", "--protocol", "paper"), ["fixed", "paper"]),
        (("--protocol", "surrogate", "--protocol", "all"), list(PROTOCOLS)),
    ],
)
def test_protocols_asked_for(flags, expected):
    assert audit_options.protocols(parse(*flags)) == (expected or [p for p in PROTOCOLS if p != "surrogate"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--protocol", "corrected", "--num-guesses", "9"), "--num-guesses is given under protocol corrected"),
        (("--num-guesses", "9", "--grid", "8"), "--grid is given under protocol fixed, expected only under corrected"),
        (("--protocol", "fixed", "--surrogates", "b.csv"), "--surrogates is given under protocol fixed"),
        (("--protocol", "holdout", "--spending", "geometric"), "--spending is given under protocol holdout"),
        (("--num-splits", "3"), "--num-splits is given under protocol corrected, expected only under median"),
        (("--protocol", "paper", "--seed", "0"), "--seed is given under protocol paper, expected only under holdout"),
    ],
)
def test_options_that_fit_no_protocol_are_refused(flags, message):
    with pytest.raises(ValueError) as error:
        audit_options.protocols(parse(*flags))
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "number"), [("7", 7), ("1.0", 1.0), (".5", 0.5), ("3,0", (3, 0))])
def test_a_dot_makes_a_fraction(text, number):
    (found,) = parse("--grid", text).grid
    assert (found, type(found)) == (number, type(number))


@pytest.mark.parametrize("text", ["many", "1,2,3", "0.5,0.5", "1,", "1e2"])
def test_what_is_no_number_of_guesses_is_refused(capsys, text):
    with pytest.raises(SystemExit):
        parse("--num-guesses", text)
    assert f"{text!r}, expected N, a fraction such as 0.5, or IN,OUT" in capsys.readouterr().err


def test_options_are_those_of_audit():
    parameters = inspect.signature(audit).parameters
    for name in audit_options.TAKEN_BY:
        assert parameters[name].default == getattr(Options, name)
        assert getattr(parse(), name) is None
    assert parse().significance == parameters["significance"].default


def test_help_says_everything():
    text = audit_options.parser().format_help()
    columns = ("id", "included", "score", "run", "pair")
    for word in (*PROTOCOLS, *auditors.NAMES, *columns, *(auditor.assumption for auditor in auditors.AUDITORS)):
        assert word in text.split() or f"{word}," in text or f"{word})" in text
    for name in audit_options.TAKEN_BY:
        assert f"--{name.replace('_', '-')}" in text
    assert "(default 25)" in text
