"""What an ONNX file seems to promise: names, dtypes and shapes in, a contract with remarks out.

Exporters have no common tongue for state: `h`/`hn`, `state`/`stateN`, `x_in`/`x_out`, `past_*`/`present_*`. This file
knows these habits. It must not know onnx or onnxruntime, nor run anything: what names and shapes leave open is said in a
remark and not guessed away; server/dropin.py tries it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from contract.bundle import BATCH, TIME, Axis, Bundle, Graph, State, Tensor, validate

Dim = int | str | None


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a file: a dim is a number, a symbol, or None where the file doesn't say."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A contract, what was guessed or left open, and why it can't be served, if it can't."""

    graph: Graph
    remarks: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(slots=True)
class _Axes:
    """Which symbols of a file mean what."""

    batch: str | None = None
    time: str | None = None
    fixed: bool = False  # rows can't be stacked: the batch is fixed to 1
    flat: bool = False  # what callers send has one axis at most, so that may be the rows
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def propose(file: str, inputs: Sequence[Port], outputs: Sequence[Port], batch_first: bool = True) -> Proposal:
    """The contract that fits the ports of an ONNX file best.

    `batch_first` decides only where the symbols do not: whether rows or steps lie first in an input of two open axes.
    """
    axes = _Axes()
    pairs = _pairs(inputs, outputs, axes.remarks)
    if pairs and len(pairs) == len(inputs):
        axes.remarks.append("every input would be a state, and nothing be left to send: no state is assumed")
        pairs = []
    taken, given = {i.name for i, _ in pairs}, {o.name for _, o in pairs}
    data = [p for p in inputs if p.name not in taken]
    axes.flat = all(len(p.dims) < 2 for p in data)
    _find_batch(axes, data, [i for i, _ in pairs], batch_first)
    _find_time(axes, data, batch_first)
    tensors = [_input(p, axes, batch_first) for p in data]
    states = [_state(i, o, axes) for i, o in pairs]
    results = [_output(p, axes, any(TIME in t.axes for t in tensors)) for p in outputs if p.name not in given]
    if not results and given:
        axes.remarks.append("it gives nothing but its next state: callers get that")
        results = [_output(p, axes, False) for p in outputs if p.name in given]
    timed = any(TIME in t.axes for t in tensors)
    if states and not timed:
        axes.remarks.append("no input has an axis of open length beside its rows: each call or turn is one step")
    if axes.fixed:
        axes.remarks.append("the batch is fixed to 1: callers take turns, each row runs alone; export it dynamic to serve them together")
    graph = Graph(
        file, tuple(tensors), tuple(results), tuple(s for s in states if s is not None), cut=bool(states) and timed,
        shared=not axes.fixed, max_time=Graph.max_time if timed else 1, max_rows=1 if axes.fixed else Graph.max_rows,
    )  # fmt: skip
    found = [f.removeprefix("graph 'model': ") for f in validate(Bundle("model", {"model": graph}, "model"))]
    return Proposal(graph, tuple(dict.fromkeys(axes.remarks)), tuple(dict.fromkeys(axes.faults + found)))


# States


_INTO = (
    r"(?:past|prev|previous|old|last|initial|init|input|in|current|cur)[_.](?:key_values[_.])?(.+)",
    r"(.+)[_.](?:in|input|prev|previous|past|old|init|initial|i)",
    r"(.*[a-z])[_.]?0",
    r"(h|c|s|state|hidden|cell)in",
    r"(.*\d)i",
    r"([hc])x",
)
_OUT_OF = (
    r"(?:present|next|new|updated|final|output|out|cur|current)[_.](?:key_values[_.])?(.+)",
    r"(.+)[_.](?:out|output|next|new|updated|present|final|o)",
    r"(.*[a-z])[_.]?n",
    r"(.+)[_.]1",
    r"(h|c|s|state|hidden|cell)out",
    r"(.*\d)o",
    r"([hc])y",
)


def _stems(name: str, marks: Sequence[str]) -> dict[str, int]:
    """What a name may be called without its mark → 1 for having lost one; the name itself → 0."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # stateIn → state_in
    found = {m[1].strip("_."): 1 for mark in marks if (m := re.fullmatch(mark, plain)) and m[1].strip("_.")}
    if marks is _OUT_OF and (m := re.fullmatch(r"(.*[a-z])_?n(_?\d+)", plain)):  # hn0, h_n_0
        found.setdefault(m[1] + m[2], 1)
    if marks is _OUT_OF and (m := re.fullmatch(r"([a-z]+)1", plain)):  # h0 → h1
        found.setdefault(m[1], 1)
    return {plain: 0} | found


def _strength(into: str, out_of: str) -> int:
    """How plainly two names are one thing before and after: 0 not at all, 1 by a mark on one side, 2 on both."""
    one, other = _stems(into, _INTO), _stems(out_of, _OUT_OF)
    return max((one[stem] + other[stem] for stem in one.keys() & other.keys()), default=0)


_TELLING = re.compile(r"state|hidden|hid\b|cell|cache|memory|rnn|lstm|gru|past|carry|^[hc]\d*(_|$|x|n|i)", re.IGNORECASE)


def _pairs(inputs: Sequence[Port], outputs: Sequence[Port], remarks: list[str]) -> list[tuple[Port, Port]]:
    named = {(i.name, o.name): s for i in inputs for o in outputs if (s := _strength(i.name, o.name))}
    like = [(i, o) for i in inputs for o in outputs if (i.name, o.name) in named and _alike(i, o)]
    found: list[tuple[Port, Port]] = []
    for i, o in like:
        mine = named[i.name, o.name]
        rivals = [(a, b) for a, b in like if (a is i) != (b is o) and named[a.name, b.name] >= mine]
        if not rivals:
            found.append((i, o))
            continue
        others = sorted({b.name if a is i else a.name for a, b in rivals})
        remarks.append(f"{i.name!r} might become {o.name!r}, but so might {', '.join(map(repr, others))}: not taken for a state")
    kept = {i.name for i, _ in found}
    spent = {o.name for _, o in found}
    for i in inputs:
        if i.name in kept:
            continue
        for o in outputs:
            if (i.name, o.name) not in named or _alike(i, o) or o.name in spent:
                continue
            if len(_open(i)) < 2:
                remarks.append(f"{i.name!r} and {o.name!r} are named like a state but differ: {_spell(i)} and {_spell(o)}")
            elif _TELLING.search(i.name):
                remarks.append(f"{i.name!r} {_spell(i)} has more than one open axis: a state's size can't change, so callers send it")
        looks = [
            o for o in outputs if o.name not in spent and _alike(i, o) and (_TELLING.search(i.name) or (not kept and _only(i, o, inputs)))
        ]
        if len(looks) == 1 and (i.name, looks[0].name) not in named:
            remarks.append(f"{i.name!r} may be a state that becomes {looks[0].name!r}, by form; by name it is not: say so if it is")
    return found


def _only(i: Port, o: Port, inputs: Sequence[Port]) -> bool:
    """Whether an input is the only one that might be a state by its form: of rows that are rows of some size, and not all there is."""
    return len(i.dims) > 1 and len(inputs) > 1 and [p for p in inputs if _alike(p, o)] == [i]


def _alike(i: Port, o: Port) -> bool:
    """Same dtype, no contradiction in shape, and no more than one open axis: what grows or varies is no state."""
    if i.dtype != o.dtype or not i.dims or (o.dims and len(i.dims) != len(o.dims)):
        return False
    if sum(not isinstance(d, int) for d in i.dims) > 1:
        return False
    return all(a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in zip(i.dims, o.dims or i.dims, strict=True))


def _spell(port: Port) -> str:
    return f"{port.dtype} [{', '.join('?' if d is None else str(d) for d in port.dims)}]"


# Axes


_BATCH_LIKE = re.compile(r"b|n|bs|rows?|.*batch.*", re.IGNORECASE)
_TIME_LIKE = re.compile(r"t|l|s|.*(time|seq|len|step|frame|sample|token|chunk).*", re.IGNORECASE)
_LENGTHS = re.compile(r"(.*[_.])?(lengths?|lens?|seq_?lens?|seqlens?)", re.IGNORECASE)


def _open(port: Port) -> list[int]:
    return [at for at, d in enumerate(port.dims) if not isinstance(d, int)]


def _find_batch(axes: _Axes, data: Sequence[Port], states: Sequence[Port], batch_first: bool) -> None:
    """Which symbol is rows; or that rows are fixed to 1."""
    if states and all(not _open(s) for s in states):
        axes.fixed = True
    elif any(not _open(s) for s in states):
        stuck = [s.name for s in states if not _open(s)]
        axes.faults.append(f"states {', '.join(map(repr, stuck))} have no open axis and others have: export the batch dynamic everywhere")
    sent = sorted((str(p.dims[at]) for p in data for at in _open(p) if isinstance(p.dims[at], str)), key=lambda s: "batch" not in s)
    kept = {p.dims[at] for p in states for at in _open(p)}
    shared = [s for s in dict.fromkeys(sent) if s in kept]
    like = [s for s in sent if _BATCH_LIKE.fullmatch(s)]
    if not axes.fixed and len(shared) == 1:
        axes.batch = shared[0]
    elif like:
        axes.batch = like[0]
    carriers = [p for p in data if p.dims and not (len(p.dims) == 1 and isinstance(p.dims[0], int))]
    if not states and carriers and all(p.dims[0] == 1 and axes.batch not in p.dims for p in carriers):
        axes.fixed, axes.batch = True, None
    if axes.batch is None and not axes.fixed:
        leading = [p.dims[_open(p)[0 if batch_first or len(_open(p)) < 2 else 1]] for p in carriers if _open(p)]
        named = [d for d in leading if isinstance(d, str)]
        if named and (len(_open(carriers[0])) > 1 or not _TIME_LIKE.fullmatch(named[0])):
            axes.batch = named[0]
            axes.remarks.append(f"axis {axes.batch!r} is taken for the batch")


def _batch_at(port: Port, axes: _Axes, batch_first: bool) -> int | None:
    """Where rows lie in a data input; None for a constant of the round."""
    if axes.batch is not None and axes.batch in port.dims:
        return port.dims.index(axes.batch)
    if axes.fixed:
        ones = [at for at, d in enumerate(port.dims) if d == 1]
        return ones[0] if ones and (len(port.dims) > 1 or axes.flat) else None
    if not any(isinstance(d, str) for d in port.dims) and (free := _open(port)):
        return free[0 if batch_first or len(free) < 2 else 1]
    return None


def _find_time(axes: _Axes, data: Sequence[Port], batch_first: bool) -> None:
    """Which symbol is steps: the other open axis of the data."""
    others = []
    for p in data:
        rows = _batch_at(p, axes, batch_first)
        if rows is not None:
            others += [str(p.dims[at]) for at in _open(p) if at != rows and isinstance(p.dims[at], str)]
    distinct = list(dict.fromkeys(others))
    like = [s for s in distinct if _TIME_LIKE.fullmatch(s)]
    if len(distinct) == 1:
        axes.time = distinct[0]
    elif distinct:
        axes.time = (like or distinct)[0]
        axes.remarks.append(f"of the open axes {', '.join(map(repr, distinct))}, {axes.time!r} is taken for time")


def _input(port: Port, axes: _Axes, batch_first: bool) -> Tensor:
    rows = _batch_at(port, axes, batch_first)
    free = [at for at in _open(port) if at != rows]
    steps = next((at for at in free if port.dims[at] == axes.time), None)
    if steps is None and rows is not None and axes.time is None and len(free) == 1:
        steps = free[0]
        if port.dims[steps] is None:
            axes.remarks.append(f"input {port.name!r} does not name its axes: axis {rows} is taken for the batch, axis {steps} for time")
    found = tuple(
        BATCH if at == rows else TIME if at == steps and rows is not None else dim if isinstance(dim, int) else _name(port, at)
        for at, dim in enumerate(port.dims)
    )
    if rows is None:
        axes.remarks.append(f"input {port.name!r} has no axis of rows: a constant of the round, callers run together where it is equal")
    whole_numbers = port.dtype in ("int32", "int64")
    role = "lengths" if whole_numbers and found == (BATCH,) and _LENGTHS.fullmatch(port.name) else "data"
    if role == "lengths":
        axes.remarks.append(f"input {port.name!r} is filled in by the server with the steps of each row")
    if rows is not None and axes.fixed and port.dims[rows] not in (1, axes.batch):
        axes.faults.append(f"input {port.name!r}: its batch is fixed to {port.dims[rows]}; export it dynamic, or fixed to 1")
    return Tensor(port.name, port.dtype, found, role=role)


def _state(port: Port, after: Port, axes: _Axes) -> State | None:
    free = _open(port)
    ones = [at for at, d in enumerate(port.dims) if d == 1]
    if free:
        rows = free[0]
    elif ones:
        rows = 1 if len(port.dims) == 3 and 1 in ones else ones[0]  # recurrent layers keep [layers, rows, hidden]
    else:
        axes.faults.append(f"state {port.name!r} {_spell(port)} has no axis of rows: export the model with a batch axis, dynamic or 1")
        return None
    shape: list[Axis] = [BATCH if at == rows else dim if isinstance(dim, int) else 1 for at, dim in enumerate(port.dims)]
    return State(port.name, after.name, port.dtype, tuple(shape))


def _output(port: Port, axes: _Axes, timed: bool) -> Tensor:
    rows = port.dims.index(axes.batch) if axes.batch is not None and axes.batch in port.dims else None
    if rows is None:
        likely = [at for at, d in enumerate(port.dims) if (d == 1 if axes.fixed else not isinstance(d, int)) and d != axes.time]
        rows = likely[0] if likely else None
        if rows is not None and not axes.fixed:
            axes.remarks.append(f"output {port.name!r}: axis {rows} is taken for the batch")
    found: list[Axis] = []
    for at, dim in enumerate(port.dims):
        if at == rows:
            found.append(BATCH)
        elif isinstance(dim, int):
            found.append(dim)
        elif timed and TIME not in found and (dim == axes.time or dim is None or axes.time is None):
            found.append(TIME)
        else:
            found.append(_name(port, at))
    return Tensor(port.name, port.dtype, tuple(found), finite=True)


def _name(port: Port, at: int) -> str:
    """A named axis that is neither rows nor time."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", str(port.dims[at] or "")).lstrip("_.-")[:100]
    return plain if plain and plain not in (BATCH, TIME) else re.sub(r"[^A-Za-z0-9._-]", "_", f"axis{at}_{port.name}")[:128]


def describe(proposal: Proposal) -> Iterator[str]:
    """The proposal as lines of a table, its remarks and faults below."""
    graph = proposal.graph
    lines = [("", "name", "form", "meaning")]
    for t in graph.inputs:
        what = (
            "the server fills it in" if t.role == "lengths" else "a constant of the round" if t.batch_axis is None else "sent by the caller"
        )
        lines.append(("input", t.name, f"{t.dtype} [{', '.join(map(str, t.axes))}]", what))
    for s in graph.states:
        lines.append(("state", f"{s.input} → {s.output}", f"{s.dtype} [{', '.join(map(str, s.axes))}]", f"starts at {s.initial:g}"))
    for t in graph.outputs:
        what = "of every step" if TIME in t.axes else "of the last step" if graph.states else "of the whole"
        lines.append(("output", t.name, f"{t.dtype} [{', '.join(map(str, t.axes))}]", what))
    widths = [max(len(line[at]) for line in lines) for at in range(4)]
    for line in lines:
        yield "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
    yield ""
    yield (
        "sessions: "
        + ("yes" if graph.states else "no, it has no state")
        + (
            "; a turn is one step"
            if graph.max_time == 1 and graph.states
            else "; cut anywhere in time"
            if graph.cut
            else "; a call runs whole"
        )
    )
    yield "rows of several callers " + ("run together" if graph.shared else "never run together")
    yield from (f"remark: {r}" for r in proposal.remarks)
    yield from (f"fault: {f}" for f in proposal.faults)
