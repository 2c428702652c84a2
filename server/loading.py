"""A bundle's graphs on one device: loaded, tried, and how large rounds of them are to be.

It knows graphs and trials; it must not know engines, queues or callers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from contract import tolerance
from contract.bundle import Bundle, BundleError, Graph
from server import trial
from server.bound import BoundGraph, unbound
from server.devices import Device, Placement
from server.graph import OnnxGraph
from server.rounds import Limits
from server.trial import Point

log = logging.getLogger(__name__)

LANES = 2  # rounds of a model under way at once on a device: one runs there while the next is stacked and the last is answered


@dataclass(frozen=True, slots=True)
class Trials:
    """How the sizes of rounds are found for each model: as given, or for those that are None measured when it is loaded, in about
    `seconds`; what was measured is kept in `notes`, where there is such a file."""

    rows: int | None = 64
    chunk: int | None = 32
    seconds: float = 0.5
    notes: Path | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A bundle's graphs, ready to run; `ran` says what their first rounds took: graph, rows, seconds a step."""

    graphs: dict[str, OnnxGraph]
    limits: Limits
    ran: Sequence[tuple[str, int, float]]
    measured: Sequence[Point]


class Loader:
    """Loads bundles the same way: where, how, and within which limits."""

    def __init__(self, placement: Placement, trials: Trials, limits: Limits) -> None:
        self.placement = placement
        self._trials = trials
        self._limits = limits

    def load(self, bundle: Bundle, directory: Path, device: Device) -> Loaded:
        """Load and try every graph. Raises BundleError with all that is wrong: with a file, or with what the device makes of it."""
        graphs: dict[str, OnnxGraph] = {}
        faults: list[str] = []
        ran: list[tuple[str, int, float]] = []
        for key, graph in bundle.graphs.items():
            try:
                graphs[key] = onnx = self._graph(graph, directory / graph.file, device)
                found, times = trial.first_run(onnx)
                if not found and not device.near:
                    found = trial.agree(onnx, OnnxGraph(graph, directory / graph.file), tolerance.allowed(bundle.verified, key))
                if not found and isinstance(onnx, BoundGraph) and (why := onnx.check_captured(trial.drawing(graph))) is not None:
                    log.warning("%s: graph %r is not run as CUDA graphs: %s", bundle.name, key, why)
                faults += [f"graph {key!r}: {fault}" for fault in found]
                ran += [(key, rows, seconds) for rows, seconds in times]
            except BundleError as e:
                faults += [f"graph {key!r}: {fault}" for fault in e.faults]
        if faults:
            raise BundleError(str(directory), faults)
        limits, points = self._sizes(bundle, graphs[bundle.main])
        ran += [(bundle.main, point.rows, point.seconds / point.steps) for point in points]
        return Loaded(graphs, limits, ran, points)

    def _graph(self, graph: Graph, file: Path, device: Device) -> OnnxGraph:
        if self.placement.banks and unbound(graph) is None:
            return BoundGraph(graph, file, device, self.placement, self._trials.rows or trial.ROWS[-1])
        return OnnxGraph(graph, file, device, replace(self.placement, captured=False))

    def _sizes(self, bundle: Bundle, onnx: OnnxGraph) -> tuple[Limits, Sequence[Point]]:
        """How large its rounds are to be, and what that was measured by."""
        trials = self._trials
        limits = self._limits if onnx.device.near else replace(self._limits, workers=LANES, lanes=LANES)
        if trials.rows is not None and trials.chunk is not None:
            return replace(limits, rows=trials.rows, chunk=trials.chunk), ()
        notes = trial.Notes(trials.notes) if trials.notes is not None else None
        key = f"{bundle.fingerprint} {onnx.device} {'banks' if isinstance(onnx, BoundGraph) else 'host'}"
        points = notes.get(key) if notes is not None else None
        if points is None:
            try:
                points = trial.measure(onnx, trials.seconds, trials.rows or trial.ROWS[-1])
            except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
                raise BundleError(bundle.name, [f"graph {bundle.main!r} could not be measured: {e}"[:300]]) from None
            if notes is not None:
                notes.put(key, points)
        sizes = trial.choose(points)
        limits = replace(limits, rows=trials.rows or sizes.rows, chunk=trials.chunk or sizes.chunk)
        if not onnx.device.near:  # on a CPU a round of few rows leaves another core to another round
            limits = replace(limits, share=min(sizes.share, limits.rows))
        log.info(
            "%s on %s: rounds of at most %d rows and %d steps, by ms a round:\n%s", bundle.name, onnx.device, limits.rows, limits.chunk,
            trial.table(points),
        )  # fmt: skip
        return limits, points
