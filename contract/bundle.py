"""What a model promises, as data: the bundle.

A bundle is a directory with `bundle.json`, one ONNX file per graph and the text resources it names. This file knows
what a bundle may say and what must be true of it; it must not know torch, onnx, onnxruntime or gRPC.

Axes carry the meaning of every tensor:

    "batch"         rows that run together; any position, not only 0 (an LSTM state is [layers, "batch", hidden])
    "time"          the axis a sequence advances along, and the only one it is cut along
    "batch*source"  ragged: the rows' own lengths laid end to end, nothing padded; the part after * names the length
    "source"        any other name: a length of the row's own; rows share a round only where it is equal
    256             a number: exactly that

A tensor without a batch axis is a constant of the round: rows share a round only where it is equal.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from contract import document

FORMAT = 1
FILE = "bundle.json"
BATCH = "batch"
TIME = "time"

Axis = str | int

DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64",
    )
}  # fmt: skip

TENSOR_DTYPES: Mapping[str, np.dtype[Any]] = {**DTYPES, "string": np.dtype(object)}
"""What inputs and outputs may be: numbers, which states may be too, and texts (each a str)."""

ROLES = ("data", "lengths", "row")
"""What fills an input: `data` the caller; `lengths` the server, with the steps of each row (ONNX `sequence_lens`);
`row` the server, with the row that each cell of a ragged tensor belongs to."""

TASKS = ("classify", "translate", "forecast", "tag", "generate", "tensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class BundleError(ValueError):
    """A bundle that cannot be served; `faults` has every reason at once, each with what to do."""

    def __init__(self, where: str, faults: list[str]) -> None:
        self.where = where
        self.faults = faults
        super().__init__(f"{where}: " + "; ".join(faults))


def is_ragged(axis: Axis) -> bool:
    """Whether an axis lays the rows' own lengths end to end ("batch*source")."""
    return isinstance(axis, str) and axis.startswith(BATCH + "*")


# Tensor, State and Graph have no slots: every round asks what follows from them, and cached properties need a __dict__.


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    meaning: str = ""
    role: str = "data"
    low: float | None = None  # smallest value a caller may send, inclusive
    high: float | None = None  # largest, inclusive: for token ids the vocabulary size less one
    finite: bool = True  # refuse NaN and infinity

    def __hash__(self) -> int:
        return hash(self.name)  # look-ups by tensor are made for every request

    @cached_property
    def batch_axis(self) -> int | None:
        """Where rows lie: the position of "batch", or of the ragged axis; None for a constant of the round."""
        for position, axis in enumerate(self.axes):
            if axis == BATCH or is_ragged(axis):
                return position
        return None

    @cached_property
    def time_axis(self) -> int | None:
        return self.axes.index(TIME) if TIME in self.axes else None

    @cached_property
    def ragged(self) -> bool:
        return any(is_ragged(axis) for axis in self.axes)

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return TENSOR_DTYPES[self.dtype]

    @cached_property
    def allowed(self) -> float:
        """A number that it may have: the lowest, or 0 where there is none, or what is below 0."""
        return self.low if self.low is not None else 0 if self.high is None else min(0, self.high)

    @cached_property
    def packed(self) -> int:
        """Bytes of one row's one step where rows lie end to end and, within a row, its steps: [batch, time, numbers...] or
        [batch, numbers...]; 0 where they lie otherwise."""
        rest = self.axes[2:] if self.time_axis == 1 else self.axes[1:]
        if self.role != "data" or not self.axes or self.axes[0] != BATCH or not all(isinstance(a, int) for a in rest):
            return 0
        return self.numpy_dtype.itemsize * math.prod(int(a) for a in rest)


@dataclass(frozen=True)
class State:
    """A value that a graph takes in, gives back, and that the server carries between rounds."""

    input: str
    output: str
    dtype: str
    axes: tuple[Axis, ...]
    initial: float = 0.0  # what a fresh row is filled with

    @cached_property
    def batch_axis(self) -> int:
        return self.axes.index(BATCH)

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    def fresh(self, rows: int) -> np.ndarray[Any, Any]:
        """The state of `rows` sequences that have read nothing."""
        shape = [rows if axis == BATCH else int(axis) for axis in self.axes]
        return np.full(shape, self.initial, self.numpy_dtype)

    @property
    def bytes_per_row(self) -> int:
        return self.numpy_dtype.itemsize * math.prod(int(a) for a in self.axes if a != BATCH)


@dataclass(frozen=True)
class Graph:
    """One ONNX file and what its inputs, outputs and states mean."""

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: tuple[State, ...] = ()
    cut: bool = True  # may be run over a part of the time axis; False: one-shot (a bidirectional encoder)
    padded: bool = False  # one-shot, but rows of different lengths may share a run: the shorter filled up, each `lengths` its own
    shared: bool = True  # rows of several callers may share a run; False where batch-mates alter the answer
    max_time: int = 65536  # steps one caller may send for one request; without any time axis a call is one step, and this 1
    max_rows: int = 65536  # rows one caller may send; 1, and not shared, where the file's batch is fixed to 1

    def input(self, name: str) -> Tensor | None:
        return next((t for t in self.inputs if t.name == name), None)

    def output(self, name: str) -> Tensor | None:
        return next((t for t in self.outputs if t.name == name), None)

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        """The inputs that a caller sends."""
        return tuple(t for t in self.inputs if t.role == "data")

    @cached_property
    def expected(self) -> Mapping[str, Tensor]:
        """The same by name."""
        return {t.name: t for t in self.data}

    @cached_property
    def packed(self) -> tuple[int, ...] | None:
        """Bytes of one row's one step of each input, where one row's values can be taken as they come from the wire."""
        sizes = tuple(t.packed for t in self.inputs)
        return sizes if all(sizes) else None

    @cached_property
    def timed(self) -> bool:
        """Whether any output has a value for every step."""
        return any(t.time_axis is not None for t in self.outputs)

    @cached_property
    def place(self) -> Mapping[str, int]:
        """Where an output of that name stands."""
        return {t.name: i for i, t in enumerate(self.outputs)}

    @cached_property
    def state_axes(self) -> tuple[int, ...]:
        """Where rows lie in each state."""
        return tuple(s.batch_axis for s in self.states)

    @cached_property
    def constants(self) -> tuple[str, ...]:
        """Of these, the constants of a round: rows share one only where they are equal."""
        return tuple(t.name for t in self.data if t.batch_axis is None)

    @cached_property
    def ragged(self) -> bool:
        return any(t.ragged for t in self.inputs)


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything a server needs to know of a model."""

    name: str
    graphs: Mapping[str, Graph]
    main: str  # the graph that plain tensor calls reach
    task: Mapping[str, Any] = field(default_factory=lambda: {"kind": "tensors"})
    resources: Mapping[str, str] = field(default_factory=dict)  # name → file: vocabularies and the like
    made_from: Mapping[str, Any] = field(default_factory=dict)  # data, config, seed, revision, scores
    verified: Mapping[str, Any] = field(default_factory=dict)  # what the exporter compared, and the largest error
    precision: str = "float32"  # how the graphs keep and compute numbers; what an exporter calls it
    fingerprint: str = ""  # of what was exported; left empty in one that is written by hand
    format: int = FORMAT

    @property
    def graph(self) -> Graph:
        return self.graphs[self.main]

    @property
    def kind(self) -> str:
        return str(self.task.get("kind", "tensors"))

    def to_json(self) -> str:
        return json.dumps(document.plain(self), indent=1, ensure_ascii=False) + "\n"


def load(directory: Path | str) -> Bundle:
    """Read and check the bundle in `directory`.

    Raises BundleError with every fault found: in the description, in the files it names, in their fingerprint.
    """
    directory = Path(directory)
    try:
        return _load(directory)
    except (OSError, BundleError):
        raise
    except Exception as e:  # a file from outside: whatever nonsense it says, it is the bundle that is refused
        raise BundleError(str(directory), [f"{FILE} makes no sense ({type(e).__name__}: {e}): export the model again"[:300]]) from e


def _load(directory: Path) -> Bundle:
    try:
        read = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(str(directory), [_absent(directory)]) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise BundleError(str(directory), [f"{FILE} is not JSON ({e}): export the model again"]) from None
    bundle, faults = parse(read)
    if bundle is not None:
        faults += validate(bundle)
        missing = [name for name in files(bundle) if _escapes(name) or not (directory / name).is_file()]
        faults += [f"file {name!r} is missing: copy the whole bundle or export it again" for name in missing]
        if not missing and not faults and not bundle.fingerprint:  # written by hand: nothing was exported to compare with
            bundle = replace(bundle, fingerprint=fingerprint(bundle, directory))
        elif not missing and not faults and fingerprint(bundle, directory) != bundle.fingerprint:
            faults.append("a file differs from what was exported (fingerprint): copy or export the bundle again")
    if bundle is None or faults:
        raise BundleError(str(directory), faults)
    return bundle


def _absent(directory: Path) -> str:
    """Why there is no bundle to read, by what is there in its place."""
    found = sorted(file.name for file in directory.glob("*.onnx"))
    if not found:
        return f"no {FILE} and no ONNX file: export a model into it, or put one there as model.onnx"
    again = "export the model again where it was exported, for it is written last"
    if len(found) == 1:
        return f"no {FILE} beside {found[0]}: `seqserve inspect {directory / found[0]} --json` prints one to put there; or {again}"
    return f"no {FILE}, and {len(found)} ONNX files ({', '.join(found)}): leave one of them, or write a {FILE} that names each; or {again}"


def save(bundle: Bundle, directory: Path | str) -> Bundle:
    """Write `bundle.json` beside files already in place: last, by rename, with its fingerprint. Returns what was
    written. Raises BundleError where the description is faulty."""
    directory = Path(directory)
    if faults := validate(bundle):
        raise BundleError(str(directory), faults)
    bundle = replace(bundle, fingerprint=fingerprint(bundle, directory))
    part = directory / (FILE + ".part")
    with part.open("w", encoding="utf-8") as out:
        out.write(bundle.to_json())
        out.flush()
        os.fsync(out.fileno())  # a directory with bundle.json is a whole bundle, after a power cut too
    part.replace(directory / FILE)
    return bundle


def files(bundle: Bundle) -> list[str]:
    """The files a bundle names, beside bundle.json."""
    return sorted({graph.file for graph in bundle.graphs.values()} | set(bundle.resources.values()))


def fingerprint(bundle: Bundle, directory: Path) -> str:
    """sha256 over what decides an answer: graphs, task, and every file's bytes; not over notes about the making."""
    known = document.plain(bundle)
    digest = hashlib.sha256(json.dumps([known.get(k, {}) for k in ("graphs", "main", "task", "resources")], sort_keys=True).encode())
    for name in files(bundle):
        digest.update(name.encode() + b"\0" + hashlib.sha256((directory / name).read_bytes()).digest())
    return "sha256:" + digest.hexdigest()


def validate(bundle: Bundle) -> list[str]:
    """Every fault of the description, each with what to do; an empty list where there is none."""
    faults: list[str] = []
    if bundle.format != FORMAT:
        faults.append(f"format {bundle.format}: this release reads format {FORMAT}; export the model again")
    if not _NAME.fullmatch(bundle.name):
        faults.append(f"name {bundle.name!r}: use letters, digits, '.', '_' or '-', at most 128")
    if bundle.kind not in TASKS:
        faults.append(f"task kind {bundle.kind!r}: one of {', '.join(TASKS)}")
    if bundle.main not in bundle.graphs:
        faults.append(f"main graph {bundle.main!r} is not among the graphs: {', '.join(bundle.graphs) or 'there are none'}")
    for name in files(bundle):
        if _escapes(name):
            faults.append(f"file {name!r}: must be a plain name inside the bundle")
    for name, graph in bundle.graphs.items():
        faults += [f"graph {name!r}: {fault}" for fault in _graph_faults(graph)]
    return faults


def _graph_faults(graph: Graph) -> Iterator[str]:
    names = [t.name for t in graph.inputs] + [s.input for s in graph.states]
    yield from (f"input {n!r} is named {names.count(n)} times: name it once" for n in sorted({n for n in names if names.count(n) > 1}))
    for names in ([t.name for t in graph.outputs], [s.output for s in graph.states]):  # what a state becomes may be an output too
        yield from (f"output {n!r} is named {names.count(n)} times: name it once" for n in sorted({n for n in names if names.count(n) > 1}))
    if not graph.outputs:
        yield "has no outputs: name at least one"
    if graph.max_time < 1:
        yield f"max_time {graph.max_time}: must be at least 1"
    if not any(t.batch_axis is not None for t in graph.inputs):
        yield "no input has a batch axis: name the axis that rows lie on 'batch'"
    if graph.max_rows < 1:
        yield f"max_rows {graph.max_rows}: must be at least 1"
    if graph.max_rows == 1 and graph.shared:
        yield "max_rows is 1, so rows of several callers can't run together: set shared to false"
    if graph.padded:
        yield from (f"is padded, but {fault}" for fault in _padded_faults(graph))
    if graph.states and graph.max_time > 1 and not any(t.time_axis is not None for t in graph.data):
        yield (
            "has states but no input with a time axis: name the axis that a sequence advances along 'time', or set max_time to 1 "
            "where a call is one step"
        )
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for t in tensors:
            yield from (f"{kind} {t.name!r}: {fault}" for fault in _tensor_faults(t))
    ragged = {a for t in graph.inputs if t.role == "data" for a in t.axes if is_ragged(a)}
    for t in graph.inputs:
        if t.role == "row" and (len(t.axes) != 1 or t.axes[0] not in ragged):
            yield f"input {t.name!r}: role 'row' needs one ragged axis that a data input has too"
        if t.role == "lengths" and t.axes != (BATCH,):
            yield f"input {t.name!r}: role 'lengths' has exactly the axes ['batch']"
    for t in graph.outputs:
        if any(is_ragged(a) and a not in ragged for a in t.axes):
            yield f"output {t.name!r}: its ragged axis is not one of the inputs'"
        if t.batch_axis is None:
            yield f"output {t.name!r}: needs a batch axis, so that each row gets its own"
    for s in graph.states:
        if s.dtype not in DTYPES:
            yield f"state {s.input!r}: dtype {s.dtype!r}: one of {', '.join(DTYPES)}"
        if list(s.axes).count(BATCH) != 1 or not all(a == BATCH or (isinstance(a, int) and a > 0) for a in s.axes):
            yield f"state {s.input!r}: axes {list(s.axes)} must be numbers and 'batch' once"
        if not math.isfinite(s.initial):
            yield f"state {s.input!r}: initial must be a finite number"


def _padded_faults(graph: Graph) -> Iterator[str]:
    if graph.cut:
        yield "may be cut: then nothing needs to be filled up; leave padded out"
    if not any(t.role == "lengths" for t in graph.inputs):
        yield "no input has the role 'lengths', which tells the model where each row ends"
    if graph.ragged:
        yield "has ragged inputs: padded is for rows that lie beside each other"
    for t in graph.data:
        if t.time_axis is not None and (t.batch_axis is None or t.dtype == "string"):
            yield f"input {t.name!r}, which has a time axis, " + ("has no batch axis" if t.batch_axis is None else "holds texts")


def _tensor_faults(t: Tensor) -> Iterator[str]:
    if t.dtype not in TENSOR_DTYPES:
        yield f"dtype {t.dtype!r}: one of {', '.join(TENSOR_DTYPES)}"
    if t.dtype == "string" and (t.batch_axis is None or t.role != "data" or t.low is not None or t.high is not None):
        yield "a tensor of texts has a batch axis, the role 'data', and neither low nor high"
    if t.role not in ROLES:
        yield f"role {t.role!r}: one of {', '.join(ROLES)}"
    for axis in t.axes:
        if isinstance(axis, int) and axis < 1:
            yield f"axis {axis}: a number must be at least 1"
        if isinstance(axis, str) and not (is_ragged(axis) or _NAME.fullmatch(axis)):
            yield f"axis {axis!r}: use a plain name"
    named = [a for a in t.axes if isinstance(a, str)]
    if len(set(named)) < len(named):
        yield "an axis name is there twice"
    if sum(a == BATCH or is_ragged(a) for a in t.axes) > 1:
        yield "has two batch axes"
    if t.ragged and TIME in t.axes:
        yield "a ragged tensor can't also be cut in time"
    if t.low is not None and t.high is not None and t.low > t.high:
        yield f"low {t.low} is above high {t.high}"


def parse(read: object) -> tuple[Bundle | None, list[str]]:
    """Build a Bundle from decoded JSON; on faults of form, None and all of them."""
    faults: list[str] = []
    if not isinstance(read, dict):
        return None, [f"{FILE} must hold one object"]
    if read.get("format") != FORMAT:
        return None, [f"format {read.get('format')!r}: this release reads format {FORMAT}; export the model again"]
    graphs: dict[str, Graph] = {}
    described = read.get("graphs")
    if not isinstance(described, dict) or not described:
        faults.append("graphs: must be an object with at least one graph")
        described = {}
    for name, d in described.items():
        at = f"graphs.{name}"
        if not isinstance(d, dict):
            faults.append(f"{at}: must be an object")
            continue
        parts: dict[str, tuple[Any, ...]] = {}
        for key, kind in (("inputs", Tensor), ("outputs", Tensor), ("states", State)):
            listed = d.get(key, [])
            if not isinstance(listed, list):
                faults.append(f"{at}.{key}: must be a list")
                listed = []
            made = [document.build(kind, item, f"{at}.{key}[{i}]", faults) for i, item in enumerate(listed)]
            parts[key] = tuple(m for m in made if m is not None)
        graph = document.build(Graph, {**d, **parts}, at, faults)
        if graph is not None:
            graphs[str(name)] = graph
    bundle = document.build(Bundle, {**read, "graphs": graphs}, FILE, faults)
    return (None, faults) if faults else (bundle, faults)


def _escapes(name: str) -> bool:
    return not name or Path(name).name != name or name in (".", "..")
