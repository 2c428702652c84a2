"""What a session's turn costs: `make bench-sessions`. Every store and durability side by side in one run, with 1, 64 and 256
live sessions: turns a second, latency, and the server's own CPU time a turn; then replays, and 100,000 open sessions.

The load is a closed loop from this process over a few Turns streams: a session sends its next turn when the last is
answered. A message carries one turn, or one turn of each of 32 sessions; and at the end 32 turns of one session, sent ahead,
which the server joins, or with --chunk 1 runs one by one. All servers run from the start and take turns, so
that drift of the machine meets them alike. Speed is printed and never judged; it fails where an answer is not, bit for bit,
what the model gives to the whole sequence at once.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from contract.bundle import Graph
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from tests.figures.crash import store
from tests.models import two_layers
from tests.process import Served, serve

SERVICE = "/seqserve.v1.Sessions/"
STREAMS = 4
TOGETHER = 32  # turns of one message, each of another session
INPUTS = np.random.default_rng(0).normal(size=(64, 1, 1, 16)).astype(np.float32)  # turn t of session n brings number 7n + t
BROUGHT = [
    pb.TurnRequest(tensors=pb.Tensors(tensors=[pb.Tensor(name="x", datatype="FP32", shape=x.shape, data=x.tobytes())])).SerializeToString()
    for x in INPUTS
]
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Live:
    """One session as its caller knows it; `replies` are kept of a sample, to be checked."""

    number: int
    id: str
    turn: int = 0
    replies: list[bytes] | None = None


@dataclass(slots=True)
class Group:
    """Sessions whose turns travel in one message."""

    sessions: list[Live]
    due: int = 0
    sent: float = 0.0


@dataclass(slots=True)
class Cell:
    """What one way of calling one server came to, over all repeats."""

    turns: int = 0
    seconds: float = 0.0
    cpu: float = 0.0  # of the server
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.turns / self.seconds

    @property
    def cost(self) -> float:
        """µs of the server's CPU a turn."""
        return self.cpu / self.turns * 1e6

    def at(self, share: float) -> float:
        """Milliseconds within which that share of the messages was answered in full."""
        return float(np.quantile(self.latencies, share)) * 1e3


@dataclass(slots=True)
class Running:
    """A server under load, and its open sessions."""

    title: str
    served: Served
    lives: list[Live] = field(default_factory=list)
    cells: dict[tuple[int, int], Cell] = field(default_factory=dict)  # by live sessions and turns a message
    replays: Cell = field(default_factory=Cell)

    @property
    def pid(self) -> int:
        return self.served.process.pid

    @property
    def cpu(self) -> float:
        """Seconds of CPU that the server has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def resident(self) -> int:
        """Bytes of memory that the server holds."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def open(self, prefix: str, count: int, sampled: int = 0) -> list[Live]:
        """Open sessions, many at a time; the first `sampled` keep their replies."""
        ask = self.served.method(SERVICE + "Open")
        room = threading.Semaphore(128)
        model = tasks_pb.Model(name="two_layers")
        asked = []
        for number in range(count):
            room.acquire()
            call = ask.future(pb.OpenRequest(session=f"{prefix}-{number}", model=model))
            call.add_done_callback(lambda _: room.release())
            asked.append(call)
        for call in asked:
            call.result()
        return [Live(n, f"{prefix}-{n}", replies=[] if n < sampled else None) for n in range(count)]


def _as_it_is(data: bytes) -> bytes:
    return data


def varint(n: int) -> bytes:
    """Always three bytes long, so that nothing else in a message changes with it."""
    return bytes((n & 127 | 128, n >> 7 & 127 | 128, n >> 14))


def message(group: Group, acknowledged: int | None = None) -> bytes:
    """A TurnsRequest with the present turn of each session, which acknowledges the one before unless another is named. Put together
    from parts: the client must not be what is measured."""
    parts: list[bytes] = []
    for live in group.sessions:
        id = live.id.encode()
        turn = b"\x0a%c%b\x10%b\x18%b%b" % (
            len(id),
            id,
            varint(live.turn),
            varint(live.turn - 1 if acknowledged is None else acknowledged),
            BROUGHT[(7 * live.number + live.turn) % 64],
        )
        parts += (b"\x0a", varint(len(turn)), turn)
    return b"".join(parts)


def drive(channel: grpc.Channel, groups: list[Group], turns: int, until: float, latencies: list[float], replay: bool) -> None:
    """One stream, in this thread: each group sends its next turns when all it sent were answered, at most `turns` times."""
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    of = {live.id: (group, live) for group in groups for live in group.sessions}
    left = dict.fromkeys(map(id, groups), turns)

    def send(group: Group) -> bool:
        if not left[id(group)] or time.perf_counter() > until:
            return False
        left[id(group)] -= 1
        if not replay:
            for live in group.sessions:
                live.turn += 1
        group.due = len(group.sessions)
        data = message(group)
        group.sent = time.perf_counter()
        out.put(data)
        return True

    call = channel.stream_stream(SERVICE + "Turns", _as_it_is, _as_it_is)(iter(out.get, None))
    under_way = sum([send(group) for group in groups])
    for data in call:
        now = time.perf_counter()
        for reply in pb.TurnsReply.FromString(data).turns:
            group, live = of[reply.session]
            if reply.turn != live.turn or reply.HasField("refusal"):
                raise AssertionError(f"session {live.id}, turn {live.turn}: answered {reply}")
            if live.replies is not None:
                if replay and live.replies[-1] != reply.tensors.tensors[0].data:
                    raise AssertionError(f"session {live.id}, turn {live.turn}: the replay differs")
                if not replay:
                    live.replies.append(reply.tensors.tensors[0].data)
            group.due -= 1
            if not group.due:
                latencies.append(now - group.sent)
                under_way -= not send(group)
        if not under_way:
            out.put(None)


def load(server: Running, lives: list[Live], together: int, cell: Cell, seconds: float, turns: int = 1 << 20, replay: bool = False) -> None:
    """Keep these sessions busy for a while, all turns of the same number in flight at most once; adds to `cell`."""
    groups = [Group(lives[i : i + together]) for i in range(0, len(lives), together)]
    streams = [s for i in range(STREAMS) if (s := groups[i::STREAMS])]
    failed: list[BaseException] = []
    before = sum(live.turn for live in lives)
    answered = len(cell.latencies)

    def run(mine: list[Group]) -> None:
        try:
            drive(server.served.channel, mine, turns, until, cell.latencies, replay)
        except BaseException as e:
            failed.append(e)

    cpu, began = server.cpu, time.perf_counter()
    until = began + seconds
    threads = [threading.Thread(target=run, args=(mine,), daemon=True) for mine in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    cell.seconds += time.perf_counter() - began
    cell.cpu += server.cpu - cpu
    cell.turns += together * (len(cell.latencies) - answered) if replay else sum(live.turn for live in lives) - before


def session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def bare(onnx: ort.InferenceSession, graph: Graph, rows: int = TOGETHER, runs: int = 400) -> float:
    """µs of CPU a row that onnxruntime alone takes for one step."""
    feeds = {"x": np.repeat(INPUTS[0], rows, 0)} | {s.input: s.fresh(rows) for s in graph.states}
    best = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(runs // 5):
            onnx.run(None, feeds)
        best.append((time.thread_time() - began) / (runs // 5) / rows * 1e6)
    return statistics.median(best)


def wrong(onnx: ort.InferenceSession, graph: Graph, live: Live) -> bool:
    """Whether a session's replies are other than what the model gives to its whole input at once."""
    if not live.replies:
        return False
    x = np.concatenate([INPUTS[(7 * live.number + turn) % 64] for turn in range(1, live.turn + 1)], 1)
    (whole,) = onnx.run(["y"], {"x": x} | {s.input: s.fresh(1) for s in graph.states})
    return bool(whole.tobytes() != b"".join(live.replies))


@contextmanager
def servers(directory: Path, kinds: list[tuple[str, str]]) -> Iterator[list[Running]]:
    """A server for each store and durability, all at once."""
    with ExitStack() as stack:
        running = []
        for kind, durability in kinds:
            place = directory / f"{kind}-{durability}"
            place.mkdir()
            address = stack.enter_context(store(kind, str(place)))
            flags = ("--store", address, "--durability", durability)
            title = kind if kind == "memory" else f"{kind} {durability}"
            running.append(Running(title, stack.enter_context(serve(directory / "models", *flags))))
        yield running


def crowd(directory: Path, count: int, seconds: float, onnx: ort.InferenceSession, graph: Graph) -> tuple[str, int]:
    """Very many open sessions that have read something, on LMDB; what to say of them, and how many answers were wrong."""
    address = f"lmdb:{directory}/crowd"
    flags = ("--store", address, "--max-sessions", str(count + 1000))
    few, among, reopened = Cell(), Cell(), Cell()
    with serve(directory / "models", *flags) as served:
        server = Running("crowd", served)
        active = server.open("active", 64, sampled=4)
        load(server, active, 1, few, seconds)
        before = server.resident
        began = time.perf_counter()
        idle = server.open("idle", count)
        for i in range(0, count, 512):  # a server queues 1,024 turns of a model, and refuses more
            load(server, idle[i : i + 512], TOGETHER, Cell(), 60.0, turns=1)
        opened = time.perf_counter() - began
        grown = server.resident - before
        load(server, active, 1, among, seconds)
        served.terminate()
    began = time.perf_counter()
    with serve(directory / "models", *flags) as served:
        back = time.perf_counter() - began
        load(Running("crowd", served), [*active, *idle[:: max(1, count // 64)]], 1, reopened, seconds)
    said = (
        f"{count:,} open: {grown / count / 1024:.1f} KiB of RAM each, opened with a turn each in {opened:.0f} s, served again "
        f"{back:.1f} s after a restart; 64 active among them {among.rate:,.0f} turns/s, p50 {among.at(0.5):.1f} ms, "
        f"{among.cost:.0f} µs (before: {few.rate:,.0f}, {few.at(0.5):.1f} ms, {few.cost:.0f} µs)"
    )
    return said, sum(wrong(onnx, graph, live) for live in active)


def ahead(directory: Path, repeats: int, seconds: float, onnx: ort.InferenceSession, graph: Graph) -> tuple[str, int]:
    """One session that sends 32 turns ahead, joined and one by one; what to say of it, and how many answers were wrong."""
    joined, alone = Cell(), Cell()
    with serve(directory / "models") as one, serve(directory / "models", "--chunk", "1") as other:
        pairs = [(Running("joined", one), joined), (Running("one by one", other), alone)]
        lives = [server.open("ahead", 1, sampled=1)[0] for server, _ in pairs]
        for _ in range(repeats):
            for (server, cell), live in zip(pairs, lives, strict=True):
                cpu, began, turns = server.cpu, time.perf_counter(), live.turn
                send_ahead(server.served.channel, live, began + seconds, cell.latencies)
                cell.seconds += time.perf_counter() - began
                cell.cpu += server.cpu - cpu
                cell.turns += live.turn - turns
        bad = sum(wrong(onnx, graph, live) for live in lives)
    said = (
        f"one session, {TOGETHER} turns sent ahead: joined {joined.rate:,.0f} turns/s, {joined.cost:.0f} µs of CPU a turn, p50 of the "
        f"{TOGETHER} {joined.at(0.5):.1f} ms; one by one {alone.rate:,.0f}, {alone.cost:.0f} µs, {alone.at(0.5):.1f} ms"
    )
    return said, bad


def send_ahead(channel: grpc.Channel, live: Live, until: float, latencies: list[float]) -> None:
    """One stream of one session: its next turns in one message, when all before were answered."""
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = channel.stream_stream(SERVICE + "Turns", _as_it_is, _as_it_is)(iter(out.get, None))
    replies = (reply for data in call for reply in pb.TurnsReply.FromString(data).turns)
    assert live.replies is not None
    while time.perf_counter() < until:
        sent = time.perf_counter()
        steps = [Live(live.number, live.id, live.turn + n) for n in range(1, TOGETHER + 1)]
        out.put(message(Group(steps), live.turn))
        for step in steps:
            reply = next(replies)
            if reply.turn != step.turn or reply.HasField("refusal"):
                raise AssertionError(f"session {live.id}, turn {step.turn}: answered {reply}")
            live.replies.append(reply.tensors.tensors[0].data)
        live.turn += TOGETHER
        latencies.append(time.perf_counter() - sent)
    out.put(None)


def table(running: list[Running], counts: list[int]) -> Table:
    made = Table(title="Turns of one time step; CPU is the server's, a turn; latency is of a whole message")
    made.add_column("sessions", justify="right")
    made.add_column("store")
    for together in (1, TOGETHER):
        for name in ("turns/s", "p50 ms", "p99 ms", "CPU µs"):
            made.add_column(f"{name}\n{together} a message", justify="right")
    for count in counts:
        for server in running:
            row = [str(count), server.title]
            for together in (1, TOGETHER):
                cell = server.cells.get((count, together))
                row += [f"{cell.rate:,.0f}", f"{cell.at(0.5):.2f}", f"{cell.at(0.99):.2f}", f"{cell.cost:.1f}"] if cell else ["–"] * 4
            made.add_row(*row)
        made.add_section()
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-sessions", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 64, 256], help="live sessions")
    parser.add_argument("--seconds", type=float, default=1.5, help="of load, each time")
    parser.add_argument("--repeats", type=int, default=3, help="times that each is measured, in turn")
    parser.add_argument("--stores", nargs="*", help="such as memory lmdb:process redis:process; all that can be had")
    parser.add_argument("--open", type=int, default=100_000, help="sessions open at once at the end; 0 leaves this out")
    options = parser.parse_args()
    stores = options.stores or ["memory", "lmdb:none", "lmdb:process", "lmdb:disk"]
    if options.stores is None:
        if shutil.which("redis-server"):
            stores.append("redis:process")
        else:
            print("redis-server is not installed: Redis is left out")
    kinds = [(kind, durability or "process") for kind, _, durability in (s.partition(":") for s in stores)]
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        bundle = two_layers(directory / "models" / "two_layers" / "1")
        onnx = session(directory / "models" / "two_layers" / "1" / bundle.graph.file)
        rows: list[float] = []
        with servers(directory, kinds) as running:
            for server in running:
                server.lives = server.open("s", max(options.sessions), sampled=8)
            for _ in range(options.repeats):
                for count in options.sessions:
                    for together in (1, TOGETHER):
                        for server in running if count >= together else ():
                            cell = server.cells.setdefault((count, together), Cell())
                            load(server, server.lives[:count], together, cell, options.seconds)
                rows.append(bare(onnx, bundle.graph))
                for server in running:
                    load(server, server.lives[: options.sessions[-1]], 1, server.replays, options.seconds / 2, replay=True)
            bad += sum(wrong(onnx, bundle.graph, live) for server in running for live in server.lives)
        said = crowd(directory, options.open, options.seconds, onnx, bundle.graph) if options.open else ("", 0)
        bad += said[1]
        in_line = ahead(directory, options.repeats, options.seconds, onnx, bundle.graph)
        bad += in_line[1]
    console = Console()
    console = Console(width=max(console.width, 120))  # narrower, figures are cut off
    console.print(table(running, options.sessions))
    print(f"bare onnxruntime: {statistics.median(rows):.1f} µs a row at {TOGETHER} rows")
    print("replayed turns/s: " + ", ".join(f"{s.title} {s.replays.rate:,.0f} ({s.replays.cost:.0f} µs)" for s in running))
    if said[0]:
        print(said[0])
    print(in_line[0])
    most = options.sessions[-1]
    by = {s.title: s.cells for s in running}
    parts = [f"{most} sessions"]
    for title in ("memory", "lmdb process"):
        if title in by:
            costs = [f"{by[title][most, n].cost:.1f} µs of CPU a turn, {n} a message" for n in (1, TOGETHER) if (most, n) in by[title]]
            parts.append(f"{title}: {'; '.join(costs)}")
    if "memory" in by and "lmdb process" in by:
        parts.append(f"lmdb process/memory {by['lmdb process'][most, 1].rate / by['memory'][most, 1].rate:.2f} of the turns/s")
    parts.append(f"{bad} sessions answered WRONG" if bad else "every sampled answer identical to the whole run's")
    print("bench-sessions · " + " · ".join(parts))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
