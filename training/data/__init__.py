"""Where data sets come from: a directory the user names, else their official address, once, into a cache.

It knows addresses and checksums; the files beside it know formats. Nothing here knows models.
"""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path


class DataError(RuntimeError):
    """Data that can't be found, fetched or trusted; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a data set. A checksum is "sha256:…" or "md5:…"; None where the publisher's is not known, and then the
    reader of the format checks counts instead."""

    name: str  # file name, also inside the cache
    url: str | None  # None: only from a directory that the user names
    checksum: str | None = None


def cache() -> Path:
    """Where downloads are kept: $SEQSERVE_DATA, else ~/.cache/seqserve."""
    named = os.environ.get("SEQSERVE_DATA")
    return Path(named) if named else Path.home() / ".cache" / "seqserve"


def fetch(source: Source, directory: Path | None, folder: str) -> Path:
    """The file of a source: `directory`/`folder`/name or `directory`/name where a directory is given, else the cache,
    downloaded when it is not there. Raises DataError where it is missing, can't be had or fails its checksum."""
    if directory is not None:
        for file in (directory / folder / source.name, directory / source.name):
            if file.is_file():
                return _checked(file, source)
        raise DataError(f"no {source.name} in {directory} or {directory / folder}; leave --data out to download it")
    file = cache() / folder / source.name
    if file.is_file():
        return _checked(file, source)
    if source.url is None:
        raise DataError(f"{source.name} can't be downloaded: name the directory that holds it with --data")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    print(f"fetching {source.url} into {file.parent}", file=sys.stderr)
    try:
        urllib.request.urlretrieve(source.url, part)
    except OSError as e:
        raise DataError(f"can't fetch {source.url}: {e}; fetch it yourself and name its directory with --data") from None
    _checked(part, source)
    part.replace(file)
    return file


def fetch_any(sources: tuple[Source, ...], directory: Path | None, folder: str) -> Path:
    """The first of several forms of the same data that is there; where none is, the first that can be downloaded."""
    for source in sources:
        for root in (directory,) if directory is not None else (cache(),):
            if any(file.is_file() for file in (root / folder / source.name, root / source.name)):
                return fetch(source, directory, folder)
    if directory is not None:
        names = " or ".join(s.name for s in sources)
        raise DataError(f"no {names} in {directory} or {directory / folder}; leave --data out to download it")
    return fetch(next((s for s in sources if s.url), sources[0]), None, folder)


def _checked(file: Path, source: Source) -> Path:
    if source.checksum is not None:
        kind, _, wanted = source.checksum.partition(":")
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, kind).hexdigest()
        if found != wanted:
            raise DataError(f"{file} is damaged or another version: {kind} {found}, expected {wanted}; fetch it again")
    return file
