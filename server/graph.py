"""ONNX graphs that run, on the CPU or a GPU. The only file that imports onnxruntime.

It knows names, dtypes, feeds and addresses; it must not know callers, queues or why rows were chosen to run together.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from contract.bundle import BundleError, Graph
from contract.propose import Port
from server import gather, libraries, probes, states
from server.devices import CPU, Device, Placement
from server.exclusion import Exclusion
from server.states import Bank, Rows

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

_HOME = Path(ort.__file__).parent

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

    On a CPU, one intra-op thread is what makes answers independent of batch-mates: with more, onnxruntime's LSTM splits the
    batch among threads and its GEMMs change shape with the row count.
    """

    def __init__(self, graph: Graph, file: Path, device: Device = CPU, placement: Placement | None = None) -> None:
        self.loaded = Loaded(file, device, placement)
        if faults := _faults(graph, self.loaded.session):
            raise BundleError(str(file), faults)
        self.graph = graph
        self.device = device
        self.outputs: tuple[str, ...] = (*(t.name for t in graph.outputs), *(s.output for s in graph.states))
        self._names = list(dict.fromkeys(self.outputs))
        # Where a state's next value is an output too, it is asked for once, and given twice.
        self._places = [self._names.index(name) for name in self.outputs] if len(self._names) < len(self.outputs) else None
        self._row = states.fresh(graph, 1)
        self.busy = 0.0  # seconds that the device, or a thread on a CPU, was at it: gathering and running
        self._counting = threading.Lock()
        # The binding itself: InferenceSession.run looks at all names anew each time, and `_faults` has seen to these.
        run = self.loaded.session._sess.run
        self._run = run if device.near else _together(device, run)

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        """One round: inputs and states by name → outputs, then next states, in the order of `self.outputs`."""
        options = self.loaded.options
        if _shrinking and options is None:
            with contextlib.suppress(IndexError):  # another thread's run has taken it
                options = _shrinking.pop()
        result: Sequence[Array] = self._run(self._names, feeds, options)
        return result if self._places is None else [result[place] for place in self._places]

    def fresh(self, rows: int) -> Rows:
        """The state of `rows` rows that have read nothing; one such row is the same for all."""
        return self._row if rows == 1 else states.fresh(self.graph, rows)

    @property
    def about(self) -> list[tuple[str, str, float]]:
        """What it counts: metric, its last label beside those that say which graph it is, value."""
        return [("seqserve_device_busy_seconds_total", "", self.busy)]

    def keeps(self, rows: Rows) -> bool:
        """Whether rows lie where this graph has its own."""
        return False

    def advance(self, feeds: dict[str, Array], carried: Sequence[Rows]) -> tuple[Sequence[Array], Bank, float]:
        """One round from the rows' states on, in order: its outputs, what holds all rows' next states, and the seconds that the run
        took. Those are this thread's own on a CPU, as the time of day has in it what other threads held the interpreter for."""
        if carried:
            for state, array in zip(self.graph.states, states.stack(states.here(carried)), strict=True):
                feeds[state.input] = array
        clock = time.thread_time if self.device.near else time.perf_counter
        began = clock()
        results = self.run(feeds)
        seconds = clock() - began
        self._ran(seconds)
        count = len(self.graph.outputs)
        return results[:count], tuple(results[count:]), seconds

    def _ran(self, seconds: float) -> None:
        with self._counting:
            self.busy += seconds


class Loaded:
    """An ONNX model on a device, to be run with its inputs and outputs bound to places in memory."""

    def __init__(self, source: Path | bytes, device: Device = CPU, placement: Placement | None = None) -> None:
        placement = placement or Placement()
        self.device = device
        self.captured = placement.captured  # whether runs of it can be captured as CUDA graphs
        if self.captured:
            _exclusion(device)  # from the first on, before any of them runs
        try:
            self.session = _session(source, device, placement)
        except BundleError as e:
            if not self.captured:
                raise
            self.captured = False  # onnxruntime refuses all of a model that has a part which it can't capture
            self.session = _session(source, device, replace(placement, captured=False))
            log.warning("%s: goes without CUDA graphs: %s", source if isinstance(source, Path) else "a model", "; ".join(e.faults))
        self._mine = threading.local()  # the graphs that this thread has captured: onnxruntime keeps them by thread
        self.options: ort.RunOptions | None = None
        if self.captured:
            self.options = ort.RunOptions()
            self.options.add_run_config_entry("gpu_graph_id", "-1")  # this run is not to be captured

    def bind(self) -> Binding:
        """Where one run after another finds its inputs and leaves its outputs."""
        return Binding(self.session, self.device)

    def run(self, binding: Binding) -> None:
        """Run it, and wait until it has run. Raises onnxruntime's own errors."""
        with together(self.device):
            self.session._sess.run_with_iobinding(binding.bound, self.options)

    def replay(self, binding: Binding, number: int) -> None:
        """The same as one captured CUDA graph of that number, always with this binding. The first time in each thread captures it, and
        runs the model some times more: so no output may lie where an input does."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        mine: set[int] = self._mine.__dict__.setdefault("captured", set())
        with together(self.device) if number in mine else _asked(self.device, _exclusion(self.device).alone()):
            self.session._sess.run_with_iobinding(binding.bound, options)
        mine.add(number)


_exclusions: dict[Device, Exclusion] = {}  # of devices on which CUDA graphs are captured
_NOBODY_CAPTURES = contextlib.nullcontext()


def together(device: Device) -> contextlib.AbstractContextManager[None]:
    """Around whatever a device is asked for: not while a CUDA graph is captured there. Raises DeviceLost where that fails since
    nothing can be asked for any more."""
    exclusion = _exclusions.get(device)
    around = _NOBODY_CAPTURES if exclusion is None else exclusion.together()
    return around if device.near else _asked(device, around)


@contextlib.contextmanager
def _asked(device: Device, around: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    try:
        with around:
            yield
    except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
        if (lost := probes.lost(device)) is None:
            raise
        raise lost from e


def _exclusion(device: Device) -> Exclusion:
    return _exclusions.setdefault(device, Exclusion())


def _together(device: Device, run: Any) -> Any:
    def runs(*arguments: Any) -> Any:
        with together(device):
            return run(*arguments)

    return runs


class Memory:
    """So many values of one dtype on a device, at an address that stays."""

    def __init__(self, device: Device, dtype: np.dtype[Any], values: int) -> None:
        self._value = _room([max(1, values)], dtype, device)
        self.device = _handle(device)
        self.dtype = dtype.type
        self.size = dtype.itemsize
        self.address = self._value.data_ptr()


class Binding:
    """The places of one run's inputs and outputs. Belongs to whoever runs it; kept for as long as nothing is bound anew, it may be
    run again. What it names must live until then."""

    __slots__ = ("_device", "_kept", "_session", "bound")

    def __init__(self, session: ort.InferenceSession, device: Device) -> None:
        self._session = session
        self._device = device
        self._kept: list[Any] = []
        self.bound = ort.capi.onnxruntime_pybind11_state.SessionIOBinding(session._sess)

    def feed(self, name: str, array: Array) -> None:
        """An input that lies in this process's memory."""
        array = np.ascontiguousarray(array)
        self._kept.append(array)
        with together(self._device):
            self.bound.bind_input(name, array)

    def take(self, name: str, memory: Memory, start: int, shape: Sequence[int]) -> None:
        """An input that lies on the device, from the value at `start` on."""
        self.bound.bind_input(name, memory.device, memory.dtype, shape, memory.address + start * memory.size)

    def leave(self, name: str, memory: Memory, start: int, shape: Sequence[int]) -> None:
        """An output that is to lie there."""
        self.bound.bind_output(name, memory.device, memory.dtype, shape, memory.address + start * memory.size)

    def give(self, name: str, array: Array) -> None:
        """An output that is to lie in this array."""
        self._kept.append(array)
        self.bound.bind_output(name, _HOST, array.dtype.type, array.shape, array.ctypes.data)

    def ask(self, name: str) -> None:
        """An output of a shape that is not known; see `given`."""
        self.bound.bind_output(name, _HOST)

    def given(self, place: int) -> Array:
        """The output that was bound as number `place`, counted from 0 over all of them."""
        result: Array = self.bound.get_outputs()[place].numpy()
        return result

    def fix(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> Fixed:
        """An input of a place of its own on the device, to be written to before each run."""
        value = _room(shape, dtype, self._device)
        self._kept.append(value)
        self.bound.bind_ortvalue_input(name, value._ortvalue)
        return Fixed(value, self._device)

    def fix_output(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> Fixed:
        """An output likewise, to be read after each run."""
        value = _room(shape, dtype, self._device)
        self._kept.append(value)
        self.bound.bind_ortvalue_output(name, value._ortvalue)
        return Fixed(value, self._device)


class Fixed:
    """A tensor at a place on a device."""

    __slots__ = ("_device", "_value")

    def __init__(self, value: ort.OrtValue, device: Device) -> None:
        self._value = value
        self._device = device

    def write(self, array: Array) -> None:
        with together(self._device):
            self._value.update_inplace(np.ascontiguousarray(array))

    def read(self) -> Array:
        """A copy."""
        with together(self._device):
            return np.array(self._value.numpy())


def _room(shape: Sequence[int], dtype: np.dtype[Any], device: Device) -> ort.OrtValue:
    with together(device):
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, device.kind, device.index)


def _handle(device: Device) -> Any:
    return ort.OrtDevice.make(device.kind, device.index)._get_c_device()


_HOST = _handle(CPU)


class OnnxFile:
    """An ONNX file of which nothing but itself is known: its ports, and runs of it."""

    def __init__(self, file: Path) -> None:
        self._session = _session(file, CPU, Placement())
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


def missing(device: Device, tf32: bool = False) -> str | None:
    """Why nothing can run on a device, or None where it can: tried with a model of one node. Whether TF32 is allowed is settled for the
    whole process by whoever asks first."""
    if device.kind == "cpu":
        return None
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDA in it: install seqserve[gpu] in place of seqserve[cpu]"
    try:
        probe = _probe(device, tf32)
        if not probe():
            return "it computes nonsense"
    except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
        return f"onnxruntime can't use it: {e}"[:500]
    probes.keep(device, probe)
    return None


def _probe(device: Device, tf32: bool) -> probes.Probe:
    """To the device, one node, and back."""
    loaded = Loaded(gather.model([("float32", 0)]), device, Placement(tf32=tf32))

    def works() -> bool:
        binding = loaded.bind()
        binding.feed("data0", np.ones((2, 1), np.float32))
        binding.feed("at0", np.ones(1, np.int64))
        out = np.zeros((1, 1), np.float32)
        binding.give("out0", out)
        loaded.run(binding)
        return bool(out[0, 0] == 1)

    return works


def _session(source: Path | bytes, device: Device, placement: Placement) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Rounds differ in rows and steps all the time: a memory pattern per shape would be planned and never reused.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    where = str(source) if isinstance(source, Path) else "the model that moves rows of state"
    try:
        with together(device):
            made = ort.InferenceSession(
                str(source) if isinstance(source, Path) else source, options, providers=_providers(device, placement), enable_fallback=0
            )
    except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
        raise BundleError(where, [f"onnxruntime can't load it: {e}"[:500]]) from None
    if device.kind == "cuda" and "CUDAExecutionProvider" not in made.get_providers():
        raise BundleError(where, [f"onnxruntime can't use {device}: {libraries.lacking(_HOME)}"])
    return made


def _providers(device: Device, placement: Placement) -> list[Any]:
    if device.kind == "cpu":
        return ["CPUExecutionProvider"]
    _preload(placement.tf32)
    about = {
        "device_id": str(device.index),
        # TF32 rounds factors to 10 bits: 1e-3 where bundles promise 1e-4.
        "use_tf32": str(int(placement.tf32)),
        # Shapes differ from round to round: an arena that doubles at each new one would take the device's memory from the banks.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(placement.captured)),
        # For the same reason no algorithm of a convolution is looked for by trying all, which happens anew for each shape.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return [("CUDAExecutionProvider", about), "CPUExecutionProvider"]


@functools.cache
def _preload(tf32: bool) -> None:
    """CUDA and cuDNN from their wheels, where they are installed so and the system has none."""
    if not tf32:  # for cuDNN's recurrent kernels too, which not every onnxruntime tells so
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if hasattr(ort, "preload_dlls"):
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):  # what is missing is told when a graph is loaded
            libraries.load(libraries.elsewhere(_HOME))
            ort.preload_dlls()


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
                    # Of an output its axes are a note that onnxruntime does not hold it to, and torch's exporter notes an LSTM's
                    # steps as the example's; what comes out is seen when the catalog runs it.
                    if isinstance(size, int) and axis != size and not (alone and size == 1) and side == "input":
                        wanted = f"axis {axis!r}" if isinstance(axis, str) else f"an axis of {axis}"
                        faults.append(f"{side} {name!r}: {wanted} is fixed to {size} in the file: export it dynamic")
        if side == "input":
            named = {name for name, _, _ in promised}
            faults += [f"input {n!r} of the file is not in the contract: describe it" for n in has if n not in named]
    return faults
