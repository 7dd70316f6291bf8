"""Files of scores: what is read, and what is refused with its line."""

import numpy as np
import pytest

from metacanary import score_file

GOOD = "id,included,score\na,1,0.5\nb,0,0.1\n"
PAIRS = "run,id,included,score,pair\n"


def read(folder, text, **options):
    """Reads a file of this text."""
    (folder / "scores.csv").write_text(text, **options)
    return score_file.read(folder / "scores.csv")


def test_a_file_of_one_run(tmp_path):
    data = read(tmp_path, GOOD)
    np.testing.assert_array_equal(data.scores, [0.5, 0.1])
    np.testing.assert_array_equal(data.included, [True, False])
    assert (data.ids, data.runs, data.pairs, data.pair_names, data.multi_run) == (("a", "b"), (), None, None, False)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(GOOD.splitlines()).replace("\n", "\r\n"),
        GOOD.replace("\n", "\n\n") + "  \n\n",
        'id, "included", score \n a , True, 5e-1\n"b",0.0 ,.1\n',
        "note,score,id,x,included\n,0.5,a,1,1\n,0.1,b,1,0\n",
        ",id,included,score\n0,a,1,0.5\n1,b,0,0.1\n",
        "run,id,included,score\n7,a,1,0.5\n7,b,0,0.1\n",
    ],
    ids=["crlf", "blank lines", "space", "other columns", "index column", "named run"],
)
def test_what_is_tolerated_reads_the_same(tmp_path, text):
    data, plain = read(tmp_path, text), read(tmp_path, GOOD)
    np.testing.assert_array_equal(data.scores, plain.scores)
    np.testing.assert_array_equal(data.included, plain.included)
    assert data.ids == plain.ids
    assert data.runs == (("7",) if text.startswith("run") else ())


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    assert read(tmp_path, GOOD, encoding="utf-8-sig").ids == ("a", "b")


def test_runs_are_put_in_the_order_of_the_first(tmp_path):
    data = read(tmp_path, "run,id,included,score\nx,b,1,1\ny,a,0,4\nx,a,0,2\ny,b,1,3\n")
    np.testing.assert_array_equal(data.scores, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(data.included, [[1, 0], [1, 0]])
    assert (data.ids, data.runs) == (("b", "a"), ("x", "y"))


def test_a_run_for_each_pair_makes_pairs_of_the_runs(tmp_path):
    data = read(tmp_path, PAIRS + "x,a,1,1,p\ny,b,1,3,p\nx,b,0,2,p\ny,a,0,4,p\n")
    assert data.multi_run
    np.testing.assert_array_equal(data.scores, [1, 2, 3, 4])
    np.testing.assert_array_equal(data.pairs, [0, 0, 1, 1])
    assert (data.ids, data.runs) == (("a", "b", "b", "a"), ("x", "y"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "a,1,0.2\n", "line 4: id 'a' twice, expected each canary once per run"),
        (GOOD + "c,1,nan\n", "line 4: score is 'nan', expected a finite number"),
        (GOOD + "c,1,inf\n", "line 4: score is 'inf', expected a finite number"),
        (GOOD + "c,1,high\n", "line 4: score is 'high', expected a finite number"),
        (GOOD + "c,1,\n", "line 4: score is '', expected a finite number"),
        (GOOD + "c,2,0.3\n", "line 4: included is '2', expected 0 or 1"),
        (GOOD + "c,,0.3\n", "line 4: included is '', expected 0 or 1"),
        (GOOD + "\n\nc,,0.3\n", "line 6: included is '', expected 0 or 1"),
        (GOOD + "c,1,1,\n", "line 4: 4 cells, expected 3 as in the header"),
        (GOOD + "c,1\n", "line 4: 2 cells, expected 3 as in the header"),
        ("id,included,score\na,1,0.5,\nb,0,0.1,\n", "line 2: 4 cells, expected 3 as in the header"),
        (GOOD + " ,1,0.2\n", "line 4: id is empty, expected a name"),
        ("run,id,included,score\n0,a,1,1\n,b,0,1\n", "line 3: run is empty, expected a name"),
        (PAIRS + "0,a,1,1,p\n0,b,0,1,\n", "line 3: pair is empty, expected a name"),
        ("run,id,included,score\npooled,a,1,1\n", "line 2: run is 'pooled', expected another name"),
        ("id,score\na,1\n", "has the columns id, score, expected also included"),
        ("id;included;score\na;1;2\n", "has the columns id;included;score, expected also id, included, score"),
        ("id,included,score,score\na,1,1,2\n", "has the column 'score' twice, expected each column once"),
        ("id,included,score\n\n", "has no rows, expected one per canary"),
        ("", "is no CSV file: it is empty"),
        (GOOD + '"c,1,1\n', "is no CSV file: unexpected end of data"),
        (
            "run,id,included,score\nx,a,1,1\nx,b,0,1\ny,a,1,1\ny,c,0,1\n",
            "run 'y' has other canaries than run 'x' ('b' is in one of them), expected the same ids in every run",
        ),
        ("run,id,included,score\nx,a,1,1\nx,b,0,1\ny,a,1,1\n", "run 'y' has other canaries than run 'x'"),
        ("id,included,score,pair\na,1,1,p\nb,1,1,p\n", ": pair 'p' has 2 members included, expected 1"),
        ("id,included,score,pair\na,1,1,p\nb,0,1,q\n", ": pair 'p' has 1 member(s), expected 2"),
        (
            PAIRS + "x,a,1,1,p\nx,b,0,1,p\nx,c,0,1,q\nx,d,1,1,q\n" + "y,a,1,1,p\ny,b,0,1,p\ny,c,0,1,q\ny,d,0,1,q\n",
            ": pair 'q' of run 'y' has 0 members included, expected 1",
        ),
        (
            PAIRS + "x,a,1,1,p\nx,b,0,1,p\nx,c,0,1,q\nx,d,1,1,q\n" + "y,a,1,1,p\ny,c,0,1,p\ny,b,0,1,q\ny,d,1,1,q\n",
            "line 7: id 'c' is of several pairs, expected the same in every run",
        ),
        (PAIRS + "x,a,1,1,p\nx,b,0,1,p\ny,a,1,1,p\ny,b,0,1,q\n", ": pair 'p' of run 'y' has 1 member(s), expected 2"),
    ],
)
def test_bad_files_get_one_line(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "scores.csv"))
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "scores.csv").write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(ValueError, match="is no CSV file"):
        score_file.read(tmp_path / "scores.csv")


def paired(folder, order, pair_of, run="0", flip=False):
    """A run with a pair for each two of the canaries a, b, c, d; the score of a canary is its place in the alphabet."""
    rows = [f"{run},{name},{int((name in 'ac') != flip)},{'abcd'.index(name)},{pair_of[name]}\n" for name in order]
    return read(folder, PAIRS + "".join(rows))


def test_surrogates_of_pairs_are_put_in_the_order_of_the_audited(tmp_path):
    pair_of = {"a": "p", "b": "p", "c": "q", "d": "q"}
    audited, other = paired(tmp_path, "abcd", pair_of), paired(tmp_path, "dbca", pair_of, flip=True)
    scores, included = score_file.surrogates(other, audited)
    np.testing.assert_array_equal(scores, [0, 1, 2, 3])
    np.testing.assert_array_equal(included, [0, 1, 0, 1])


def test_surrogates_that_are_independent_need_no_canaries_in_common(tmp_path):
    audited, other = read(tmp_path, GOOD), read(tmp_path, "id,included,score\nx,1,3\ny,1,2\nz,0,1\n")
    np.testing.assert_array_equal(score_file.surrogates(other, audited)[0], [3, 2, 1])


def test_surrogates_of_another_game_are_refused(tmp_path):
    pair_of = {"a": "p", "b": "p", "c": "q", "d": "q"}
    audited, single = paired(tmp_path, "abcd", pair_of), read(tmp_path, GOOD)
    crossed = paired(tmp_path, "abcd", {"a": "p", "d": "p", "b": "q", "c": "q"})
    fewer = paired(tmp_path, "ab", pair_of)
    apart = read(tmp_path, PAIRS + "x,a,1,1,p\nx,b,0,2,p\ny,c,1,3,q\ny,d,0,4,q\n")
    longer = read(tmp_path, PAIRS + "".join(f"{run},a,1,1,p\n{run},b,0,2,p\n" for run in "xyz"))
    for other, first, message in (
        (single, audited, "surrogates are independent, expected paired"),
        (audited, single, "surrogates are paired, expected independent"),
        (crossed, audited, "the pair of id 'b' is 'q', expected 'p'"),
        (fewer, audited, "the pair of id 'c' is None, expected 'q'"),
        (audited, fewer, "the pair of id 'c' is 'q', expected None"),
        (apart, audited, "are 2 pairs, each of a run of its own, expected 2 pairs in every run"),
        (longer, apart, "are 3 pairs, each of a run of its own, expected 2 pairs, each of a run of its own"),
    ):
        with pytest.raises(ValueError) as error:
            score_file.surrogates(other, first)
        assert message in str(error.value)
    np.testing.assert_array_equal(score_file.surrogates(apart, apart)[0], [1, 2, 3, 4])
