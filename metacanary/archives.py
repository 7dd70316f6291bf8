"""Archives of data sets: found where they were put by hand, or downloaded there, and held against their checksums.

tensorflow-datasets could download too, but waits for ever for a server that stalls, and for half an hour for a network
that drops packets.
"""

import functools
import hashlib
import http.client
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

from tqdm import tqdm

from metacanary import store
from metacanary.source import Archive, Source

TIMEOUT_SECONDS = 10.0
_CHUNK_BYTES = 2**20


def obtain(source: Source, data_dir: Path) -> list[Path]:
    """Finds the archives of a data set, and downloads those that are missing.

    Args:
      source: The data set.
      data_dir: The folder of all data sets; archives lie in `<data_dir>/downloads/manual`.

    Returns:
      Their paths, in the order of `source.archives`.

    Raises:
      FileNotFoundError: If an archive is missing and cannot be downloaded; the message says what to fetch, from where,
        and where to put it. Within `TIMEOUT_SECONDS` of a server's silence, also in the midst of a download.
      ValueError: If an archive has another size or checksum than its pins.
      OSError: If it cannot be written, as on a full disk.

    Guarantees:
      A file under the archive's name was downloaded whole and had every checksum that is pinned, or was put there by
      someone else. Two processes at once do no harm.
    """
    manual = data_dir / "downloads" / "manual"
    paths = [manual / archive.file_name for archive in source.archives]
    missing = [pair for pair in zip(source.archives, paths, strict=True) if not pair[1].exists()]
    for archive, path in missing:
        if not archive.url:
            raise FileNotFoundError(_wanted(source, missing, data_dir, "it cannot be downloaded"))
        try:
            _download(archive, path)
        except ConnectionError as error:
            raise FileNotFoundError(_wanted(source, missing, data_dir, str(error))) from error
    for archive, path in zip(source.archives, paths, strict=True):
        if (archive, path) not in missing:
            _check(archive, path.stat().st_size, _digests(path, archive), os.fspath(path))
    return paths


def _wanted(source: Source, missing: list[tuple[Archive, Path]], data_dir: Path, failure: str) -> str:
    """Says what to do on a machine without internet."""
    lines = [f"name={source.name!r}: {failure}. Put"]
    for archive, path in missing:
        pinned = [f"{archive.size_bytes:,} bytes"] if archive.size_bytes else []
        pinned += [f"{algorithm} {pin}" for algorithm, pin in archive.checksums.items()]
        described = f" ({', '.join(pinned)})" if pinned else ""
        lines.append(f"  {archive.url or 'the archive'}{described}\n    at {os.fspath(path.absolute())!r}")
    prepared = os.fspath((data_dir / source.name).absolute())
    return "\n".join([*lines, f"or copy {prepared!r} from a machine that has it"])


def _download(archive: Archive, path: Path) -> None:
    """Downloads an archive to its place, with a progress bar; a line each ten seconds where there is no terminal."""
    hashes, size = {algorithm: _hash(algorithm) for algorithm in archive.checksums}, 0
    every = 0.5 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        desc=f"Downloading {path.name}",
        total=archive.size_bytes or None,
        unit="B",
        unit_scale=True,
        mininterval=every,
        maxinterval=every,
    )
    with store.atomic(path) as file, bar:
        for chunk in _chunks(archive.url):
            file.write(chunk)
            for each in hashes.values():
                each.update(chunk)
            size += len(chunk)
            bar.update(len(chunk))
        # Before the file gets its name: what stands under it is never a wrong download.
        _check(archive, size, {algorithm: each.hexdigest() for algorithm, each in hashes.items()}, archive.url)


def _chunks(url: str) -> Iterator[bytes]:
    """Yields what a URL holds; raises ConnectionError with the reason if it does not, or not all."""
    received = 0
    try:
        with _open(url) as response:
            announced = response.length
            while chunk := response.read1(_CHUNK_BYTES):
                received += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        error.close()
        raise ConnectionError(f"{url} answered {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise ConnectionError(f"{url} sent nothing for {TIMEOUT_SECONDS:g} s, after {received:,} bytes") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConnectionError(f"{url} cannot be reached from here: {getattr(error, 'reason', error)}") from error
    if announced is not None and received != announced:
        raise ConnectionError(f"{url} broke off after {received:,} of {announced:,} bytes")


def _open(url: str) -> HTTPResponse:
    """Asks a server, on a thread of its own, since no timeout bounds the look-up of the name."""
    answers: list[HTTPResponse | Exception] = []

    def ask() -> None:
        try:
            answers.append(urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS))
        except Exception as error:  # whatever it is, the caller shall raise it
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    if not answers:
        raise TimeoutError
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def _check(archive: Archive, size: int, digests: dict[str, str], where: str) -> None:
    """Raises ValueError if an archive is not the one that is pinned."""
    if archive.size_bytes and size != archive.size_bytes:
        raise ValueError(f"{where} has {size:,} bytes, expected {archive.size_bytes:,}: it is another archive")
    for algorithm, pin in archive.checksums.items():
        if digests[algorithm] != pin:
            raise ValueError(
                f"{where} has {algorithm} {digests[algorithm]}, expected {pin}: it is another archive or damaged"
            )


def _digests(path: Path, archive: Archive) -> dict[str, str]:
    """Digests a file by each algorithm that its archive is pinned by."""
    digests = {}
    for algorithm in archive.checksums:
        with path.open("rb") as file:
            digests[algorithm] = hashlib.file_digest(file, functools.partial(_hash, algorithm)).hexdigest()
    return digests


def _hash(algorithm: str) -> "hashlib._Hash":
    """Begins a digest; as no protection, since a machine under FIPS refuses MD5 for that."""
    return hashlib.new(algorithm, usedforsecurity=False)
