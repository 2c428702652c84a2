"""One ONNX graph that runs. The only file that imports onnxruntime.

It knows names, dtypes and feeds; it must not know callers, queues or why rows were chosen to run together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from contract.bundle import BundleError, Graph
from contract.propose import Port

Array = np.ndarray[Any, Any]

# One arena for all graphs. Each would have one of its own, which grows to the largest round it ever ran and keeps that: with the seven
# shipped models 354 MiB resident after 1,800 random rounds by two threads, 204 with one between them, at the same speed.
ort.create_and_register_allocator(
    ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT), ort.OrtArenaCfg(0, -1, -1, -1)
)
ort.set_default_logger_severity(4)  # a failed run is an exception here already; its log line would say it twice

_ONNX_DTYPES = {
    "tensor(bool)": "bool", "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32",
    "tensor(int64)": "int64", "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64", "tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64",
    "tensor(string)": "string",
}  # fmt: skip


_shrinking: deque[ort.RunOptions] = deque(maxlen=1)  # of the next run, if it is to do more than run


def shrink() -> None:
    """Have the next run, of whichever graph, give back what the arena keeps and nobody uses then: after large rounds tens of MiB,
    which cost 2 ms to give back and as much again to get when they are needed."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    _shrinking.append(options)


class OnnxGraph:
    """A graph of a bundle, loaded. `run` may be called from many threads at once and releases the GIL.

    One intra-op thread is what makes answers independent of batch-mates: with more, onnxruntime's LSTM splits the
    batch among threads and its GEMMs change shape with the row count.
    """

    def __init__(self, graph: Graph, file: Path) -> None:
        self._session = _session(file)
        if faults := _faults(graph, self._session):
            raise BundleError(str(file), faults)
        self.graph = graph
        self.outputs: tuple[str, ...] = (*(t.name for t in graph.outputs), *(s.output for s in graph.states))
        self._names = list(self.outputs)
        # The binding itself: InferenceSession.run looks at all names anew each time, and `_faults` has seen to these.
        self._run = self._session._sess.run

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        """One round: inputs and states by name → outputs, then next states, in the order of `self.outputs`."""
        options = None
        if _shrinking:
            with suppress(IndexError):  # another thread's run has taken it
                options = _shrinking.pop()
        result: Sequence[Array] = self._run(self._names, feeds, options)
        return result


class OnnxFile:
    """An ONNX file of which nothing but itself is known: its ports, and runs of it."""

    def __init__(self, file: Path) -> None:
        self._session = _session(file)
        self.inputs = tuple(_port(value) for value in self._session.get_inputs())
        self.outputs = tuple(_port(value) for value in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. Raises ValueError where onnxruntime can't run it."""
        try:
            results: Sequence[Array] = self._session.run(None, feeds)
        except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
            raise ValueError(str(e)) from None
        return {port.name: np.asarray(result) for port, result in zip(self.outputs, results, strict=True)}


def _port(value: Any) -> Port:
    return Port(value.name, _ONNX_DTYPES.get(value.type, value.type), tuple(value.shape))


def _session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Rounds differ in rows and steps all the time: a memory pattern per shape would be planned and never reused.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
        raise BundleError(str(file), [f"onnxruntime can't load it: {e}"[:500]]) from None


def _faults(graph: Graph, session: ort.InferenceSession) -> list[str]:
    """What the ONNX file has otherwise than its contract says."""
    faults: list[str] = []
    taken = [(t.name, t.dtype, t.axes) for t in graph.inputs] + [(s.input, s.dtype, s.axes) for s in graph.states]
    given = [(t.name, t.dtype, t.axes) for t in graph.outputs] + [(s.output, s.dtype, s.axes) for s in graph.states]
    sides = (("input", session.get_inputs(), taken), ("output", session.get_outputs(), given))
    for side, found, promised in sides:
        has = {f.name: f for f in found}
        for name, dtype, axes in promised:
            if name not in has:
                faults.append(f"{side} {name!r} is in the contract but not in the file; it has {', '.join(has)}")
                continue
            real = _ONNX_DTYPES.get(has[name].type, has[name].type)
            if real != dtype:
                faults.append(f"{side} {name!r} is {real} in the file, {dtype} in the contract: correct the contract")
            shape = has[name].shape
            if shape and len(shape) != len(axes):
                faults.append(f"{side} {name!r} has {len(shape)} axes in the file, {len(axes)} in the contract")
            elif shape:
                for axis, size in zip(axes, shape, strict=True):
                    alone = (axis == "time" and graph.max_time == 1) or (axis == "batch" and graph.max_rows == 1)
                    # Of an output an open axis is a note that onnxruntime does not hold it to, and torch's exporter notes an LSTM's
                    # steps as the example's; what comes out is seen when the catalog runs it.
                    noted = side == "output" and isinstance(axis, str)
                    if isinstance(size, int) and axis != size and not (alone and size == 1) and not noted:
                        faults.append(f"{side} {name!r} axis {axis!r} is fixed to {size} in the file: export it dynamic")
        if side == "input":
            named = {name for name, _, _ in promised}
            faults += [f"input {n!r} of the file is not in the contract: describe it" for n in has if n not in named]
    return faults
