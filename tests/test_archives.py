"""Tests of metacanary.archives, over a server on the loopback interface."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import fake_archives
import pytest

from metacanary import archives, data
from metacanary.source import Archive

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def served(tmp_path):
    """A file `tiny.bin` to serve, and its entry: (folder, function of a URL)."""
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "tiny.bin").write_bytes(CONTENT)
    pinned = fake_archives.pinned(Archive(file_name="tiny.bin"), folder / "tiny.bin")

    def source(url, **changes):
        archive = dataclasses.replace(pinned, **({"url": f"{url}tiny.bin"} | changes))
        return dataclasses.replace(data.SOURCES["cifar10"], name="tiny", archives=(archive,))

    return folder, source


def headers(handler, length, status=200):
    """Sends the headers of an answer."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()


def truncated(handler):
    """Announces the file and breaks off in its midst."""
    headers(handler, len(CONTENT))
    handler.wfile.write(CONTENT[: len(CONTENT) // 2])
    handler.close_connection = True


def corrupt(handler):
    """Sends the file with one bit turned."""
    headers(handler, len(CONTENT))
    with contextlib.suppress(ConnectionError):
        handler.wfile.write(CONTENT[:1000] + bytes([CONTENT[1000] ^ 1]) + CONTENT[1001:])


def longer(handler):
    """Sends another file, such as a page that says that one has to log in."""
    headers(handler, 20)
    handler.wfile.write(b"<html>log in!</html>")


def not_found(handler):
    handler.send_error(404)


def overloaded(handler):
    handler.send_error(503)


def stalled(handler):
    """Sends half of the file and then nothing, and keeps the connection."""
    headers(handler, len(CONTENT))
    handler.wfile.write(CONTENT[: len(CONTENT) // 2])
    handler.wfile.flush()
    time.sleep(3)


def silent(handler):
    """Accepts the question and says nothing."""
    time.sleep(3)
    handler.close_connection = True


def nothing_left(data_dir):
    """Whether no file is in a folder, not even a temporary one."""
    return not [path for path in data_dir.rglob("*") if path.is_file()]


def test_obtain_downloads_once(tmp_path, served, capsys):
    folder, source = served
    asked = []
    with fake_archives.serving(folder, lambda handler: bool(asked.append(handler.path))) as url:
        for _ in range(2):
            (path,) = archives.obtain(source(url), tmp_path / "data")
            assert path == tmp_path / "data/downloads/manual/tiny.bin"
            assert path.read_bytes() == CONTENT
    assert asked == ["/tiny.bin"]
    assert [file.name for file in path.parent.iterdir()] == ["tiny.bin"]
    progress = capsys.readouterr().err
    assert "Downloading tiny.bin: 100%" in progress
    assert "1.05M/1.05M" in progress


@pytest.mark.parametrize(
    ("behave", "error", "message"),
    [
        (truncated, FileNotFoundError, "broke off after 524,288 of 1,048,576 bytes"),
        (stalled, FileNotFoundError, "sent nothing for 0.5 s, after 524,288 bytes"),
        (silent, FileNotFoundError, "sent nothing for 0.5 s, after 0 bytes"),
        (not_found, FileNotFoundError, "answered 404"),
        (overloaded, FileNotFoundError, "answered 503"),
        (corrupt, ValueError, "has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}: it is another archive or damaged"),
        (longer, ValueError, "has 20 bytes, expected 1,048,576: it is another archive"),
    ],
)
def test_obtain_refuses_a_bad_download_and_recovers(tmp_path, served, monkeypatch, behave, error, message):
    folder, source = served
    monkeypatch.setattr(archives, "TIMEOUT_SECONDS", 0.5)
    start = time.perf_counter()
    with (
        fake_archives.serving(folder, behave) as url,
        pytest.raises(error, match=f"{re.escape(url)}tiny.bin {message}"),
    ):
        archives.obtain(source(url), tmp_path / "data")
    assert time.perf_counter() - start < 2.5  # of a limit of 0.5 s; a server that stalls sleeps for 3 s
    assert nothing_left(tmp_path / "data")
    with fake_archives.serving(folder) as url:
        assert archives.obtain(source(url), tmp_path / "data")[0].read_bytes() == CONTENT


def test_obtain_refuses_a_wrong_pin(tmp_path, served):
    folder, source = served
    with fake_archives.serving(folder) as url, pytest.raises(ValueError, match=f"expected {'ab' * 32}"):
        archives.obtain(source(url, sha256="ab" * 32), tmp_path / "data")
    assert nothing_left(tmp_path / "data")


def test_obtain_holds_a_download_against_an_md5(tmp_path, served):
    folder, source = served
    pins = {"sha256": "", "md5": hashlib.md5(CONTENT).hexdigest()}
    for wrong, behave in (({}, corrupt), ({"md5": "ab" * 16}, None)):
        expected = (pins | wrong)["md5"]
        with (
            fake_archives.serving(folder, behave) as url,
            pytest.raises(ValueError, match=f"{url}tiny.bin has md5 [0-9a-f]{{32}}, expected {expected}: it is an"),
        ):
            archives.obtain(source(url, **pins | wrong), tmp_path / "data")
        assert nothing_left(tmp_path / "data")
    with fake_archives.serving(folder) as url:
        assert archives.obtain(source(url, **pins), tmp_path / "data")[0].read_bytes() == CONTENT


def test_obtain_holds_what_was_put_there_against_an_md5(tmp_path, served):
    """Of the three bytes abc, as in RFC 1321."""
    _, source = served
    entry = source("http://127.0.0.1:9/", sha256="", md5="900150983cd24fb0d6963f7d28e17f72", size_bytes=0)
    path = tmp_path / "downloads/manual/tiny.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    assert archives.obtain(entry, tmp_path) == [path]
    path.write_bytes(b"abd")
    with pytest.raises(ValueError, match=f"{path} has md5 [0-9a-f]{{32}}, expected 9001.*: it is another archive"):
        archives.obtain(entry, tmp_path)


@pytest.mark.parametrize("wrong", ["sha256", "md5"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_obtain_checks_both_checksums_if_both_are_pinned(tmp_path, served, wrong, by_hand):
    folder, source = served
    pins = {algorithm: hashlib.new(algorithm, CONTENT).hexdigest() for algorithm in ("sha256", "md5")}
    manual = tmp_path / "downloads/manual/tiny.bin"
    if by_hand:
        manual.parent.mkdir(parents=True)
        manual.write_bytes(CONTENT)
    with fake_archives.serving(folder) as url:
        with pytest.raises(ValueError, match=f"has {wrong} {pins[wrong]}, expected {pins[wrong][::-1]}"):
            archives.obtain(source(url, **pins | {wrong: pins[wrong][::-1]}), tmp_path)
        assert archives.obtain(source(url, **pins), tmp_path) == [manual]


@pytest.mark.parametrize("change", [b"", CONTENT[:-1], b"x" + CONTENT[1:]])
def test_obtain_checks_what_was_put_there_by_hand(tmp_path, served, change):
    _, source = served
    path = tmp_path / "data/downloads/manual/tiny.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert archives.obtain(source("http://127.0.0.1:9/"), tmp_path / "data") == [path]
    path.write_bytes(change)
    with pytest.raises(ValueError, match=rf"{path} has .*, expected .*: it is another archive"):
        archives.obtain(source("http://127.0.0.1:9/"), tmp_path / "data")
    assert path.read_bytes() == change  # whose it is, decides


def test_obtain_offline_says_what_to_fetch_for_every_missing_file(tmp_path, served):
    _, source = served
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    entry = source(url)
    second = dataclasses.replace(entry.archives[0], file_name="folder/second.bin", url=f"{url}second.bin")
    third = Archive(file_name="third.bin", url=f"{url}third.bin", md5="ab" * 16)
    fourth = Archive(file_name="fourth.bin", url=f"{url}fourth.bin")
    there = Archive(file_name="there.bin", url=f"{url}there.bin")
    (tmp_path / "downloads/manual").mkdir(parents=True)
    (tmp_path / "downloads/manual/there.bin").write_bytes(b"")
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        archives.obtain(dataclasses.replace(entry, archives=(*entry.archives, second, third, fourth, there)), tmp_path)
    assert time.perf_counter() - start < 15
    manual, pin = tmp_path / "downloads/manual", f"(1,048,576 bytes, sha256 {entry.archives[0].sha256})"
    refused = str(error.value).splitlines()
    assert refused[0].startswith(f"name='tiny': {url}tiny.bin cannot be reached from here: ")
    assert "refused" in refused[0]
    assert refused[1:] == [
        f"  {url}tiny.bin {pin}",
        f"    at '{manual}/tiny.bin'",
        f"  {url}second.bin {pin}",
        f"    at '{manual}/folder/second.bin'",
        f"  {url}third.bin (md5 {'ab' * 16})",
        f"    at '{manual}/third.bin'",
        f"  {url}fourth.bin",
        f"    at '{manual}/fourth.bin'",
        f"or copy '{tmp_path}/tiny' from a machine that has it",
    ]


def test_obtain_offline_of_an_archive_without_url(tmp_path, served):
    _, source = served
    entry = source("")
    entry = dataclasses.replace(entry, archives=(dataclasses.replace(entry.archives[0], url=""),))
    with pytest.raises(FileNotFoundError, match=r"name='tiny': it cannot be downloaded\. Put\n  the archive \(1,048,5"):
        archives.obtain(entry, tmp_path)


def test_obtain_bounds_a_name_that_is_never_found(tmp_path, served, monkeypatch):
    """The look-up of a name may take minutes and heeds no timeout."""
    _, source = served
    monkeypatch.setattr(archives, "TIMEOUT_SECONDS", 0.3)
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: release.wait(10))
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"sent nothing for 0\.3 s, after 0 bytes"):
        archives.obtain(source("http://nowhere.invalid/"), tmp_path)
    assert time.perf_counter() - start < 2
    release.set()


def test_timeout_leaves_time_for_the_error():
    assert archives.TIMEOUT_SECONDS <= 10


def test_obtain_passes_on_what_is_wrong_with_the_disk(tmp_path, served):
    """A folder that cannot be written is no failure of the network."""
    folder, source = served
    (tmp_path / "data").write_text("a file where a folder should be")
    with fake_archives.serving(folder) as url, pytest.raises(NotADirectoryError):
        archives.obtain(source(url), tmp_path / "data")


# Another process that obtains the file when it is told to.
OBTAIN = """
import dataclasses, json, pathlib, sys
from metacanary import archives, data
from metacanary.source import Archive
archive = Archive(**json.loads(sys.argv[2]))
source = dataclasses.replace(data.SOURCES["cifar10"], name="tiny", archives=(archive,))
print("ready", flush=True)
input()
archives.obtain(source, pathlib.Path(sys.argv[1]))
"""


def test_obtain_twice_at_once(root, tmp_path, served):
    """Both download, slowly enough to overlap; the file is whole at every moment that it is there."""
    folder, source = served

    def slow(handler):
        headers(handler, len(CONTENT))
        for start in range(0, len(CONTENT), len(CONTENT) // 8):
            handler.wfile.write(CONTENT[start : start + len(CONTENT) // 8])
            time.sleep(0.05)

    with fake_archives.serving(folder, slow) as url, contextlib.ExitStack() as stack:
        archive = json.dumps(dataclasses.asdict(source(url).archives[0]))
        command = [sys.executable, "-c", OBTAIN, str(tmp_path / "data"), archive]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = {**os.environ, "PYTHONPATH": str(root)}
        processes = [stack.enter_context(subprocess.Popen(command, **pipes, env=env)) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    manual = tmp_path / "data/downloads/manual"
    assert [path.name for path in manual.iterdir()] == ["tiny.bin"]
    assert (manual / "tiny.bin").read_bytes() == CONTENT
