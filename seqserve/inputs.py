"""What a user hands to the command: lines, CSV files, tensors. Knows nothing of servers and models."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqserve import tensors


class Usage(Exception):
    """Input of the command line that can't be used; the message says what to do."""


def texts(given: list[str]) -> Iterator[str]:
    """The texts of the command line, else the lines of standard input that are not blank."""
    if given:
        return iter(given)
    if sys.stdin.isatty():
        print("One text a line, Ctrl-D to end:", file=sys.stderr)
    return (line.rstrip("\r\n") for line in lines() if line.strip())


def lines() -> Iterator[str]:
    """The lines of standard input as they come, ends included."""
    number = 0
    while line := sys.stdin.buffer.readline():
        number += 1
        try:
            yield line.decode()
        except UnicodeDecodeError:
            raise Usage(f"standard input, line {number}: not UTF-8; convert it first, for instance with iconv") from None


def stdin() -> str:
    return "".join(lines()).removeprefix("\ufeff")


def read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise Usage(f"{file}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise Usage(f"{file}: not UTF-8; convert it first, for instance with iconv") from None


def read_csv(text: str, columns: Sequence[str] | None, channels: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
    """The names and values (steps × columns) of a CSV text with a heading.

    Takes `columns` where given, else the model's `channels` where the file has them all, else every column whose
    first value is a number. Raises Usage, naming the line, for values that are missing or no numbers.
    """
    rows = [line for line in csv.reader(io.StringIO(text, newline="")) if line]
    if len(rows) < 2:
        raise Usage("the CSV needs a heading and at least one row")
    names, at = _columns(rows[0], rows[1], columns, channels)
    return names, np.stack([_numbers(line, number, names, at) for number, line in enumerate(rows[1:], 1)])


def observations(columns: Sequence[str] | None, channels: Sequence[str]) -> Iterator[NDArray[np.float32]]:
    """The rows of a CSV on standard input as they come, columns chosen as by `read_csv`.

    The heading may be left out where every row is a number for each of the model's channels, as when they are typed.
    """
    rows = (line for line in csv.reader(line.removeprefix("\ufeff") for line in lines()) if line)
    heading = next(rows, [])
    names, at, number = list(channels), list(range(len(channels))), 1
    if columns is None and heading and all(_is_number(cell) for cell in heading) and len(heading) == len(channels):
        yield _numbers(heading, number, names, at)
        number += 1
        heading = []
    for row, line in enumerate(rows, number):
        if heading:
            names, at = _columns(heading, line, columns, channels)
            heading = []
        yield _numbers(line, row, names, at)


def _columns(
    heading: Sequence[str], first: Sequence[str], columns: Sequence[str] | None, channels: Sequence[str]
) -> tuple[list[str], list[int]]:
    """The names and places of the columns to read."""
    heading = [name.strip() for name in heading]
    if all(_is_number(name) for name in heading):
        raise Usage("the first row of the CSV must name the columns; it has numbers only")
    if columns is not None:
        if missing := [name for name in columns if name not in heading]:
            raise Usage(f"no column {', '.join(missing)} in the CSV: it has {', '.join(heading)}")
        names = list(columns)
    elif channels and set(channels) <= set(heading):
        names = list(channels)
    else:
        names = [name for name, value in zip(heading, first, strict=False) if _is_number(value)]
    if not names:
        raise Usage("no column of the CSV has numbers")
    return names, [heading.index(name) for name in names]


def _numbers(line: Sequence[str], row: int, names: Sequence[str], at: Sequence[int]) -> NDArray[np.float32]:
    """One row's values; `row` is its number below the heading."""
    values = np.empty(len(at), np.float32)
    for column, position in enumerate(at):
        cell = line[position] if position < len(line) else ""
        try:
            with np.errstate(over="raise"):
                values[column] = float(cell)
        except (ValueError, FloatingPointError):
            raise Usage(f"row {row} of the CSV, column {names[column]}: {cell!r} is not a number of 32 bits") from None
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def tensor(item: str, datatypes: Mapping[str, str]) -> tuple[str, NDArray[Any]]:
    name, equals, value = item.partition("=")
    if not (name and equals and value):
        raise Usage(f"{item!r}: write NAME=JSON or NAME=@FILE")
    if value.startswith("@") and not value.endswith(".json"):
        try:
            return name, np.load(value[1:], allow_pickle=False)
        except OSError as e:
            raise Usage(f"{value[1:]}: {e.strerror or e}") from None
        except ValueError:
            raise Usage(f"{value[1:]}: not an array that numpy.save wrote") from None
    text = read(Path(value[1:])) if value.startswith("@") else value
    try:
        listed = json.loads(text)
    except json.JSONDecodeError as e:
        raise Usage(f"{name}: not JSON ({e})") from None
    return name, _array(name, listed, datatypes)


def tensors_of(line: str, datatypes: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The tensors of a JSON object, by name."""
    try:
        listed = json.loads(line)
    except json.JSONDecodeError as e:
        raise Usage(f"not JSON ({e}): {line.strip()[:60]}") from None
    if not isinstance(listed, dict):
        raise Usage(f"write one JSON object a line, tensors by name: {{{', '.join(f'{json.dumps(name)}: …' for name in datatypes)}}}")
    return {name: _array(name, values, datatypes) for name, values in listed.items()}


def _array(name: str, listed: Any, datatypes: Mapping[str, str]) -> NDArray[Any]:
    datatype = datatypes.get(name, "")
    try:
        with np.errstate(over="raise"):  # a number beyond the datatype's range would become infinite, with a warning
            return np.array(listed, tensors.DATATYPES.get(datatype, object if datatype == tensors.BYTES else None))
    except (TypeError, ValueError, ArithmeticError) as e:
        raise Usage(f"{name}: not {datatype or 'an array'} ({e})") from None
