"""Builds and joins all objects, and tells their life in order: load, listen, serve; then drain and stop."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from server import graph, shelf
from server.catalog import Catalog, Trials
from server.config import MEASURED, Config
from server.devices import CPU, Device, Placement, parse
from server.engine import Watch
from server.errors import DeviceLost
from server.inside import Feed
from server.keys import Keys
from server.metrics import Metrics
from server.rounds import Limits
from server.rpc import health, inference, inference_stream, inside, repository, sessions, tasks
from server.rpc.answer import Desk
from server.rpc.front import Method, Options, Tls, cannot_listen, choose_front
from server.rpc.gate import Gate
from server.rpc.parameters import SERVICE
from server.rpc.settings import Settings
from server.rpc.shared_memory import Regions, SharedMemory
from server.rpc.statistics import Statistics, StatisticsService
from server.shelf import Shelf
from server.store import open_store
from server.turns import Turns
from server.workers import Workers

if TYPE_CHECKING:
    from server.tracing import Tracing

log = logging.getLogger(__name__)

# New objects between two searches for rings. Nothing that a call or a turn makes is a ring; the default of 700 searched several
# times a message, and cost 7 % of a turn.
COLLECT = (20_000, 20, 50)

# Seconds between two times that memory is given back which large rounds and messages took and nobody uses: 2 ms for onnxruntime's, half
# of one for malloc's. Without it both only grow, to what the largest moment needed and the pieces between.
TIDY_S = 60.0

# How long a worker that comes back from a run waits until the front's thread must let go of the interpreter. With Python's own
# 5 ms rounds were seen to wait 30 ms for their start and end.
SWITCH_S = 0.0005

ROWS, CHUNK = 64, 32  # of a round on a CPU, where nothing else is said


class App:
    """One server. `start` returns once it serves; `stop` drains first."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.metrics = Metrics()
        self.tracing, self.workers, watch = _traced(config, self.metrics)
        placement = _placement(config)
        trials = _trials(config, placement)
        limits = Limits(
            rows=trials.rows or ROWS, chunk=trials.chunk or CHUNK, queue=config.max_queue, wait=config.max_wait,
            standing=config.standing_wait, workers=config.workers,
        )  # fmt: skip
        statistics = Statistics(watch)
        self.catalog = Catalog(self.workers, limits, statistics, config.max_request_rows, placement, trials)
        self.store = open_store(config.store, config.durability)
        room = shelf.Limits(config.max_sessions, config.resident_sessions, config.session_ttl)
        self.shelf = Shelf(self.catalog, self.store, room, moves=config.move_sessions == "compatible")
        self.turns = Turns(self.shelf, self.workers)
        regions = Regions(config.allow_shared_memory)
        infer = inference.Inference(self.catalog, self.shelf, self.turns, lambda: self.health.serving, regions, config)
        feed = Feed(self.workers)
        self.inside = inside.Inside(feed, self.catalog, self.shelf, statistics, config.workers, lambda: self.front.live)
        services = [SERVICE, tasks.SERVICE, sessions.SERVICE, inside.SERVICE, health.SERVICE]
        self.health = health.Health(services)
        self.keys = Keys(config.keys, config.keys_interval) if config.keys is not None else None
        if self.keys is not None and self.keys.certified and config.tls_client_ca is None:
            raise ValueError(f"{config.keys} has certificates, which callers can only show with --tls-client-ca")
        desk = Desk(self.metrics, config.access_log, Gate(self.keys) if self.keys is not None else None)
        methods = {
            **infer.methods(desk),
            **inference_stream.methods(infer, desk),
            **StatisticsService(self.catalog, statistics).methods(desk),
            **repository.Repository(self.catalog, self.metrics, config.max_request_rows).methods(desk),
            **SharedMemory(regions).methods(desk),
            **Settings().methods(desk),
            **tasks.Tasks(self.catalog, lambda: self.health.serving).methods(desk),
            **sessions.Sessions(self.shelf, self.turns).methods(desk),
            **self.inside.methods(desk),
            **self.health.methods(desk),
            **(health.reflect(services, desk) if config.reflection else {}),
        }
        options = Options(
            max_receive_bytes=config.max_message_bytes,
            streams=config.connection_streams,
            keepalive_s=config.keepalive,
            processes=config.rpc_processes,
        )
        if self.tracing is not None:
            methods = self.tracing.methods(methods)
        self.methods: Mapping[str, Method] = methods
        self.front = choose_front(config.front, config.rpc_processes)(methods, options, self.workers)
        self.metrics.watch_server(self.shelf, config.workers, lambda: self.front.live)
        self.port = 0
        self.metrics_port = -1
        self._stop_metrics: Callable[[], None] = lambda: None
        self._over = threading.Event()
        self._failing = threading.Lock()  # of the next: a second signal would end the process at once
        self.failure: str | None = None  # why it can't go on, where it can't
        self.when_failed: Callable[[], None] = lambda: None  # called once then, by whatever thread; who made it is to stop it
        self.workers.when_lost = self._lost

    def start(self) -> None:
        """Load every bundle, listen, serve. Raises OSError where the port is taken, FileNotFoundError without models."""
        began = time.monotonic()
        if not self.config.models.is_dir():
            raise FileNotFoundError(f"no directory {str(self.config.models)!r}: give the bundles' with --models")
        self.catalog.scan(self.config.models)
        models = self.catalog.models()
        for model in models:
            self.metrics.watch_queue(model.engine)
        self.metrics.models([("ready", len(models)), ("refused", len(self.catalog.refused))])
        self.port = self.front.listen(f"{self.config.host}:{self.config.port}", _tls(self.config))
        if self.config.metrics_port >= 0:
            self.metrics_port, self._stop_metrics = self._serve_metrics()
        self.workers.start()
        self.shelf.start()
        if self.keys is not None:
            self.keys.start()
            if self.config.tls_cert is None:
                log.warning("keys go over the wire in the clear: set --tls-cert and --tls-key, or let only a TLS proxy reach this port")
        settle()
        threading.Thread(target=self._tidy, name="memory", daemon=True).start()
        self.front.start()
        self.health.set(True)
        if self.config.port_file is not None:
            _write(self.config.port_file, str(self.port))
        log.info(
            "serving %d models on %s:%d (metrics %s) after %.2f s", len(models), self.config.host, self.port,
            self.metrics_port if self.metrics_port >= 0 else "off", time.monotonic() - began,
        )  # fmt: skip

    def _serve_metrics(self) -> tuple[int, Callable[[], None]]:
        host, port = self.config.host, self.config.metrics_port
        try:
            return self.metrics.serve(host, port)
        except OSError as e:
            raise OSError(f"metrics: {cannot_listen(f'{host}:{port}')} ({e}): --metrics-port names another, -1 turns them off") from None

    def _tidy(self) -> None:
        while not self._over.wait(TIDY_S):
            graph.shrink()
            _trim()

    def fail(self, why: str) -> None:
        """It can't go on: call itself not serving, and tell whoever made it to stop it, once."""
        log.critical("%s", why)
        with self._failing:
            first, self.failure = self.failure is None, self.failure or why
        if first:
            self.health.set(False)
            self.when_failed()

    def _lost(self, why: DeviceLost) -> None:
        # What else the device holds in this process is as far gone: only a new process gets it back, where anything does.
        self.fail(why.message)

    def reload(self) -> None:
        """Read the keys' file anew."""
        if self.keys is not None:
            self.keys.reload()

    def stop(self) -> None:
        """Take nothing new, finish what runs, end what is left after `drain_seconds`."""
        began = time.monotonic()
        self._over.set()
        self.health.set(False)
        self.health.end()
        self.inside.end()
        self.front.drain()
        done = self.workers.drain(self.config.drain_seconds)
        left = max(0.0, self.config.drain_seconds - (time.monotonic() - began))
        self.workers.stop()
        self.shelf.stop()
        self.front.stop(min(left, 1.0) if done else 0.0)  # replies are sent; a second is for slow readers
        if self.keys is not None:
            self.keys.stop()
        self._stop_metrics()
        if self.tracing is not None:
            self.tracing.stop()
        log.info("stopped after %.2f s%s", time.monotonic() - began, "" if done else "; some requests were refused")


def settle() -> None:
    """Set Python up to serve: all that stays is there now, models and code."""
    gc.collect()
    _trim()
    gc.freeze()
    gc.set_threshold(*COLLECT)
    sys.setswitchinterval(SWITCH_S)


def _traced(config: Config, metrics: Metrics) -> tuple[Tracing | None, Workers, Watch]:
    """Workers and what engines report to, with traces of both where a collector is named. Raises ValueError without the extra."""
    if not config.otlp:
        return None, Workers(config.workers), metrics
    try:
        from server.tracing import TracedWatch, TracedWorkers, Tracing, exporting
    except ImportError as e:
        raise ValueError(f"--otlp needs OpenTelemetry: pip install 'seqserve[otel]' ({e})") from None
    traced = Tracing(exporting(config.otlp))
    workers = TracedWorkers(config.workers)
    return traced, workers, TracedWatch(metrics, workers, traced.tracer)


def _placement(config: Config) -> Placement:
    """Where rounds run. Raises ValueError where what is asked for is not there."""
    devices = parse(config.device)
    if not devices:
        why = graph.missing(Device("cuda"), config.tf32)
        if why is not None:
            log.warning("no GPU, so rounds run on the CPU: %s", why)
        devices = (Device("cuda"),) if why is None else (CPU,)
    for device in devices:
        if (why := graph.missing(device, config.tf32)) is not None:
            raise ValueError(f"--device {device}: {why}; --device auto runs on the CPU then")
    near = devices[0].near
    return Placement(
        devices, config.state == "device" or (config.state == "auto" and not near), config.device_state_mb << 20,
        min(config.max_sessions, config.resident_sessions), config.row_buckets, config.cuda_graphs, config.tf32,
    )  # fmt: skip


def _trials(config: Config, placement: Placement) -> Trials:
    near = placement.devices[0].near
    rows, chunk = (
        given if given > 0 else None if given == MEASURED or not near else usual
        for given, usual in ((config.max_rows, ROWS), (config.chunk, CHUNK))
    )
    return Trials(rows, chunk, config.measure_seconds, config.measured)


def _trim() -> None:
    """Give back to the system what was freed; by loading three models, 14 of 150 MB. glibc's own, and nothing elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _tls(config: Config) -> Tls | None:
    return None if config.tls_cert is None or config.tls_key is None else Tls(config.tls_cert, config.tls_key, config.tls_client_ca)


def _write(file: Path, text: str) -> None:
    """By rename, so that a reader never sees a part."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(file)
