"""What a GPU makes of it, or a CPU by the same code: `make gpu-bench`, `make gpu-bench RUN="--device cuda --part sessions"`.

Parts, each a table: `sessions`, turns of one step through two LSTM layers of 512, in the engine and with its sessions around it, states
on the device and on the host, beside onnxruntime and PyTorch alone; `grpc`, the same over the network; `tasks`, reviews of IMDb's
lengths and the sentences of test_2016 over gRPC; `processes`, what --rpc-processes wins (carriers.py). Answers of a sample are held
against whole runs on the CPU; it fails where one is further off than the bundle states. Speed is printed and never judged. Every part
fits a few minutes (--seconds, --sessions).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from contract import bundle as contract
from contract import tolerance
from server.app import App, settle
from server.catalog import Model
from server.config import AUTO, MEASURED, Config
from server.devices import parse
from server.graph import OnnxGraph
from server.inputs import Sizes
from server.sequence import Sequence as Ran
from server.sequence import Views
from tests.figures import carriers, gpu_limits
from tests.figures.sessions_bench import INPUTS, TOGETHER, Group, Live, message
from tests.figures.tables import ask, metrics, table
from tests.figures.turn_cost import _Call
from tests.models import two_layers
from tests.process import ROOT, serve

NAME = "two_layers"
CHECKED = 8  # sessions whose answers are kept, and compared with the CPU's
CLIENTS = max(1, min(8, (os.cpu_count() or 2) // 2))


@dataclass(slots=True)
class Cell:
    """What one way of running came to."""

    turns: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds
    moved: float = 0.0  # bytes of state that crossed to or from the device, a turn
    busy: float = 0.0  # share of the time
    rows: float = 0.0  # of a round
    cpu: float = 0.0  # seconds of this process, its callers in it

    def line(self) -> list[str]:
        at = [f"{float(np.quantile(self.latencies, q)) * 1e3:,.2f}" if self.latencies else "–" for q in (0.5, 0.99)]
        return [
            f"{self.turns / self.seconds:,.0f}",
            *at,
            f"{self.moved:,.0f}",
            f"{self.busy:.0%}",
            f"{self.rows:,.0f}",
            f"{self.cpu / max(1, self.turns) * 1e6:.1f}",
        ]


HEADS = ["turns/s", "p50 ms", "p99 ms", "state B/turn", "busy", "rows/round", "CPU µs/turn"]


def flags(device: str, state: str, sizes: str) -> list[str]:
    return [
        "--device", device, "--state", state, "--max-rows", sizes, "--chunk", sizes, "--measure-seconds", "2", "--max-queue", "40000",
        "--max-wait", "60", "--resident-sessions", "20000", "--durability", "none",
    ]  # fmt: skip


@contextmanager
def running(models: Path, device: str, state: str, sizes: str) -> Iterator[App]:
    """A server in this process that no network reaches."""
    how = {"auto": AUTO, "measured": MEASURED}
    size = how[sizes] if sizes in how else int(sizes)
    app = App(
        Config(
            models=models, device=device, state=state, max_rows=size, chunk=size, measure_seconds=2.0, max_queue=40_000, max_wait=60.0,
            durability="none", port=0, metrics_port=-1, workers=2,
        )
    )  # fmt: skip
    app.catalog.scan(models)
    app.workers.start()
    before = sys.getswitchinterval(), gc.get_threshold()
    settle()
    try:
        yield app
    finally:
        app.workers.stop()
        app.store.close()
        gc.unfreeze()
        gc.set_threshold(*before[1])
        sys.setswitchinterval(before[0])


class Counted:
    """What a model's devices counted between two moments."""

    def __init__(self, model: Model, app: App) -> None:
        self._graphs = [graph for engine in model.engine.engines for graph in engine.graphs.values()]
        self._app, self._model = app, model
        self._began, self._cpu = time.perf_counter(), time.process_time()
        self._before = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        about = [(name, value) for graph in self._graphs for name, _, value in graph.about]
        watched = self._app.metrics._of(self._model.engine)
        moved = sum(value for name, value in about if name == "seqserve_device_state_bytes_total")
        return moved, sum(graph.busy for graph in self._graphs), sum(watched.rows.counts), watched.rows.sum

    def into(self, cell: Cell, turns: int) -> Cell:
        moved, busy, rounds, rows = (now - before for now, before in zip(self._now(), self._before, strict=True))
        cell.seconds += time.perf_counter() - self._began
        cell.turns += turns
        cell.cpu += time.process_time() - self._cpu
        host = not self._graphs[0].device.near and not any(hasattr(g, "banks") for g in self._graphs)
        row = sum(s.bytes_per_row for s in self._model.bundle.graph.states)
        cell.moved = 2 * row if host else moved / max(1, turns)
        cell.busy = busy / cell.seconds / len(self._model.engine.engines)
        cell.rows = rows / max(1, rounds)
        return cell


def in_engine(app: App, sessions: int, seconds: float) -> Cell:
    """Each session's next turn is queued when its last is answered; nothing around the engine."""
    model = app.catalog.find(NAME)
    engine, main = model.engine, model.bundle.main
    inputs = [(x.tobytes(),) for x in INPUTS]
    tensor = model.bundle.graph.outputs[0]
    cell = Cell()
    done = threading.Event()
    under_way = sessions
    lock = threading.Lock()
    kept: list[list[bytes]] = [[] for _ in range(CHECKED)]
    sizes = Sizes(1, 1)
    counts = [0] * sessions
    asked = [0.0] * sessions
    over = False
    latencies: list[float] = []

    def failed(error: Exception) -> None:
        print(f"a turn failed: {error}", file=sys.stderr)
        done.set()

    def answered(number: int, sequence: Ran, outputs: Views) -> None:
        nonlocal under_way
        data, _ = outputs.data(tensor)
        now = time.perf_counter()
        latencies.append(now - asked[number])
        if number < CHECKED:
            kept[number].append(data)
        if over:
            with lock:
                under_way -= 1
                if not under_way:
                    done.set()
            return
        ask(number, sequence)

    def ask(number: int, before: Ran | None) -> None:
        counts[number] += 1
        asked[number] = time.perf_counter()
        state = before.state if before is not None else None
        engine.submit(Ran(main, inputs[(7 * number + counts[number]) % 64], sizes, partial(answered, number), failed, state))

    for number in range(sessions):
        ask(number, None)
    time.sleep(min(1.0, seconds / 3))
    counted, before = Counted(model, app), len(latencies)
    time.sleep(seconds)
    turns = len(latencies) - before
    cell.latencies = latencies[before:]
    counted.into(cell, turns)
    over = True
    if not done.wait(60):
        raise AssertionError(f"{under_way} of {sessions} turns were never answered")
    check(model, kept, "in the engine")
    return cell


def with_sessions(app: App, sessions: int, seconds: float) -> Cell:
    """Messages of 32 turns given to the Turns handler by this thread, which attends as a front's does: it hands over together what has
    come, and runs brief rounds when nothing more has. Replies leave from whoever ran the round."""
    model = app.catalog.find(NAME)
    call = _Answering()
    stream = app.methods["/seqserve.v1.Sessions/Turns"].start(call)
    lives = [Live(n, f"gpu-{sessions}-{n}") for n in range(sessions)]
    for live in lives:
        app.shelf.open(NAME, "", live.id)
    groups = [Group(lives[i : i + TOGETHER]) for i in range(0, sessions, TOGETHER)]
    call.of = {live.id: group for group in groups for live in group.sessions}

    def send(group: Group) -> None:
        for live in group.sessions:
            live.turn += 1
        group.due = len(group.sessions)
        group.sent = time.perf_counter()
        stream.on_message(message(group))

    cell = Cell()
    for group in groups:
        send(group)
    began = time.perf_counter()
    warm = began + min(1.0, seconds / 3)
    counted, turns, under_way = None, 0, len(groups)
    attends = False
    while under_way:
        if attends and call.answered.empty():
            attends = app.workers.brief()
            continue
        group, at = call.answered.get()  # asleep, as a front is until the network wakes it
        if not attends:
            app.workers.attend()
            attends = True
        if counted is None and at > warm:
            counted, turns = Counted(model, app), 0
            began = at
        if counted is not None and at <= began + seconds:
            turns += len(group.sessions)
            cell.latencies.append(at - group.sent)
        elif counted is not None and not cell.turns:
            counted.into(cell, turns)
        if cell.turns:
            under_way -= 1
        else:
            send(group)
            if app.workers.enough and not app.workers.brief():
                app.workers.attend()  # there is more to take
    while app.workers.brief():  # and from here it attends no more: what it submits next is the workers'
        pass
    for live in lives:
        app.turns.close(live.id)
    return cell


class _Answering(_Call):
    """A call whose caller only sees which group of turns was answered in full."""

    def __init__(self) -> None:
        import queue

        self.answered: queue.SimpleQueue[tuple[Group, float]] = queue.SimpleQueue()
        self.of: dict[str, Group] = {}

    def reply(self, message: bytes, trailing: Any = ()) -> None:
        now = time.perf_counter()
        for id in _sessions(message):
            group = self.of[id]
            group.due -= 1
            if not group.due:
                self.answered.put((group, now))


def _sessions(message: bytes) -> Iterator[str]:
    """The sessions of a TurnsReply, without reading the rest of it."""
    from protos import sessions_pb2 as pb

    for reply in pb.TurnsReply.FromString(message).turns:
        if reply.HasField("refusal"):
            raise AssertionError(f"refused: {reply.refusal}")
        yield reply.session


def check(model: Model, kept: list[list[bytes]], where: str) -> None:
    """Answers against whole runs on the CPU, within what the bundle states."""
    bundle = model.bundle
    reference = OnnxGraph(bundle.graph, Path(MODELS[0]) / NAME / "1" / bundle.graph.file)
    stated = tolerance.allowed(bundle.verified, bundle.main)
    for number, replies in enumerate(kept):
        if not replies:
            continue
        turns = min(len(replies), 200)
        x = np.concatenate([INPUTS[(7 * number + t) % 64] for t in range(1, turns + 1)], 1)
        whole = reference.run({"x": x, **{s.input: s.fresh(1) for s in bundle.graph.states}})[0]
        mine = np.frombuffer(b"".join(replies[:turns]), np.float32).reshape(whole.shape)
        if (times := tolerance.excess(mine, whole, stated)) > 1:
            raise AssertionError(f"session {number} {where}: off the CPU by {times:.2g} times what the bundle states")


MODELS: list[str] = []


def sessions_part(asked: argparse.Namespace, models: Path) -> None:
    lines: list[list[str]] = []
    device = parse(asked.device)[0]
    for state in ("device", "host"):
        with running(models, asked.device, state, asked.sizes) as app:
            limits = app.catalog.find(NAME).engine.rounds.limits
            print(f"states on the {state}: rounds of at most {limits.rows} rows and {limits.chunk} steps", flush=True)
            for count in asked.sessions:
                lines.append([f"engine, states on the {state}, {count:,}", *in_engine(app, count, asked.seconds).line()])
                lines.append([f"  with its sessions, {count:,}", *with_sessions(app, count, asked.seconds).line()])
    bundle = contract.load(models / NAME / "1")
    file = models / NAME / "1" / bundle.graph.file
    for count in asked.sessions:
        for far in (True, False):
            rate = gpu_limits.bare_turns(file, bundle.graph, device, count, asked.seconds / 2, far=far)
            name = f"onnxruntime alone, states {'left on the device' if far else 'as arrays'}, {count:,} rows"
            lines.append([name, f"{rate:,.0f}", *["–"] * (len(HEADS) - 1)])
        found = gpu_limits.torch_sessions(device, asked.hidden, count, asked.seconds / 2)
        if found is not None:
            lines.append([f"{found[0]}, {count:,} rows", f"{found[1]:,.0f}", *["–"] * (len(HEADS) - 1)])
    table(f"Turns of one step, two LSTM layers of {asked.hidden}, on {asked.device}", ["sessions", *HEADS], lines)


def grpc_part(asked: argparse.Namespace, models: Path) -> None:
    lines = []
    for state in ("device", "host"):
        with serve(models, *flags(asked.device, state, asked.sizes), "--rpc-processes", str(asked.rpc_processes)) as served:
            for count in asked.sessions:
                clients = min(CLIENTS, max(1, count // TOGETHER))
                before = metrics(served.metrics_port)
                began = time.perf_counter()
                made = [
                    ["turns", "--model", NAME, "--sessions", str(count // clients), "--seconds", str(asked.seconds)] for _ in range(clients)
                ]
                found = ask(served.port, made)
                wall = time.perf_counter() - began
                after = metrics(served.metrics_port)
                turns = after("seqserve_turns_total", outcome="applied") - before("seqserve_turns_total", outcome="applied")
                moved = after("seqserve_device_state_bytes_total") - before("seqserve_device_state_bytes_total")
                busy = after("seqserve_device_busy_seconds_total") - before("seqserve_device_busy_seconds_total")
                cpu = after("process_cpu_seconds_total") - before("process_cpu_seconds_total")
                rows = (after("seqserve_round_rows_sum") - before("seqserve_round_rows_sum")) / max(
                    1, after("seqserve_round_rows_count") - before("seqserve_round_rows_count")
                )
                rate, p50, p99 = sum(f["rate"] for f in found), max(f["p50"] for f in found), max(f["p99"] for f in found)
                near = parse(asked.device)[0].near
                row = 0 if near or state == "device" else 2 * sum(s.bytes_per_row for s in contract.load(models / NAME / "1").graph.states)
                lines.append([
                    f"states on the {state}, {count:,}", f"{rate:,.0f}", f"{p50:,.2f}", f"{p99:,.2f}",
                    f"{moved / max(1, turns) + row:,.0f}",
                    f"{busy / wall:.0%}", f"{rows:,.0f}", f"{cpu / max(1, turns) * 1e6:.1f}",
                ])  # fmt: skip
    title = f"The same over gRPC, 32 turns a message, {CLIENTS} client processes on the same machine; busy is of all the clients' time"
    table(title, ["sessions", *HEADS], lines)


def tasks_part(asked: argparse.Namespace) -> None:
    device = parse(asked.device)[0]
    lines = []
    with tempfile.TemporaryDirectory() as name:
        texts = {"classify": gpu_limits.reviews(asked.data, asked.texts), "translate": gpu_limits.sentences(asked.data, asked.texts)}
        limits = {
            "classify": gpu_limits.bare_reviews(texts["classify"], device),
            "translate": gpu_limits.bare_sentences(texts["translate"], device),
        }
        with serve(ROOT / "models", *flags(asked.device, "auto", asked.sizes), "--rpc-processes", str(asked.rpc_processes)) as served:
            for what, kind in (("classify", "sentiment"), ("translate", "translator")):
                clients = min(CLIENTS, 4)
                made = []
                for at in range(clients):
                    file = Path(name) / f"{what}-{at}"
                    file.write_text("\n".join(t.replace("\n", " ") for t in texts[what][at::clients]), encoding="utf-8")
                    made.append([what, "--texts", str(file), "--callers", str(512 // clients), "--whole"])
                before, began = metrics(served.metrics_port), time.perf_counter()
                found = ask(served.port, made)
                wall = time.perf_counter() - began
                after = metrics(served.metrics_port)
                busy = sum(
                    after("seqserve_device_busy_seconds_total", model=m) - before("seqserve_device_busy_seconds_total", model=m)
                    for m in [kind]
                )
                rate = sum(f["rate"] if np.isfinite(f["rate"]) else 0.0 for f in found)
                limit = limits[what]
                ratios = [f"{limit.get(k, 0):,.0f} ({rate / limit[k]:.2f})" if limit.get(k) else "–" for k in ("onnxruntime", "torch")]
                p50, p99 = max(f["p50"] for f in found), max(f["p99"] for f in found)
                lines.append(
                    [f"{what}, {len(texts[what])} texts", f"{rate:,.0f}", f"{p50:,.1f}", f"{p99:,.1f}", f"{busy / wall:.0%}", *ratios]
                )
    heads = ["over gRPC", "sequences/s", "p50 ms", "p99 ms", "busy", "onnxruntime alone (ratio)", "PyTorch (ratio)"]
    table(f"Tasks on {asked.device}, 512 under way", heads, lines)


def main(argv: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(prog="make gpu-bench", description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("--device", default="cuda", help="as the server's")
    words.add_argument("--part", default="sessions,grpc,tasks,processes", help="of the four, with commas")
    words.add_argument("--sessions", type=lambda t: [int(n) for n in t.split(",")], default=[1, 64, 1000, 10_000])
    words.add_argument("--seconds", type=float, default=3.0, help="of load for each figure")
    words.add_argument("--hidden", type=int, default=512)
    words.add_argument("--sizes", default="measured", help="of rounds: measured, or a number of rows")
    words.add_argument("--rpc-processes", type=int, default=0, help="as the server's, for the parts over gRPC")
    words.add_argument("--processes", type=lambda t: [int(n) for n in t.split(",")], default=[0, 1, 2, 4, 8], help="of the last part")
    words.add_argument("--texts", type=int, default=2000, help="at most, of either kind")
    words.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    asked = words.parse_args(argv)
    parts = asked.part.split(",")
    print(
        f"onnxruntime {ort.__version__} ({', '.join(ort.get_available_providers())}), {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as name:
        models = Path(name) / "models"
        two_layers(models / NAME / "1", hidden=asked.hidden)
        MODELS[:] = [str(models)]
        if "sessions" in parts:
            sessions_part(asked, models)
        if "grpc" in parts:
            grpc_part(asked, models)
        if "tasks" in parts:
            tasks_part(asked)
        if "processes" in parts:
            carriers.part(models, NAME, flags(asked.device, "auto", asked.sizes), asked.processes, CLIENTS, asked.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
