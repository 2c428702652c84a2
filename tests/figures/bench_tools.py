"""perf_analyzer, NVIDIA's C++ client, set up in a venv of its own and run; and what a process uses, from /proc.

It knows commands, windows and files; it must not know which models or workloads there are.
"""

from __future__ import annotations

import csv
import ctypes.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.process import ROOT

VENV = ROOT / ".venv-bench"
REQUIREMENTS = Path(__file__).with_name("bench-requirements.txt")
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Measured:
    """One pass of load: calls a second, milliseconds within which half and 99 % were answered, CPU µs a call of each side."""

    rate: float
    p50: float
    p99: float
    server_us: float
    client_us: float


def installed() -> None:
    """Set up the venv of client and peer, once. Raises RuntimeError, or CalledProcessError where an installer fails."""
    done = VENV / "done"
    if not done.exists() or done.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--requirement", str(REQUIREMENTS)], check=True)
        _libb64()
        done.write_text(REQUIREMENTS.read_text())


def perf_analyzer() -> tuple[Path, dict[str, str]]:
    """The client's binary and the environment it runs in; installs both on the first call. Raises as `installed` does."""
    installed()
    binary = VENV / "bin" / "perf_analyzer"
    runtime = next(VENV.glob("lib/python3*/site-packages/nvidia/cuda_runtime/lib"))
    paths = [str(runtime), *(str(p.parent) for p in (VENV / "debian").rglob("libb64.so.0d")), os.environ.get("LD_LIBRARY_PATH", "")]
    return binary, {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}


def _libb64() -> None:
    """Debian's libb64-0d, which the binary is linked against: unpacked beside it where the system has none; no root needed."""
    if ctypes.util.find_library("b64") or (VENV / "debian").exists():
        return
    if not shutil.which("apt-get"):
        raise RuntimeError("perf_analyzer needs libb64.so.0d: install it (Debian: libb64-0d; Fedora: libb64)")
    with tempfile.TemporaryDirectory() as directory:
        for command in (["apt-get", "download", "libb64-0d"], ["apt-get", "update"], ["apt-get", "download", "libb64-0d"]):
            if not list(Path(directory).glob("*.deb")):
                subprocess.run(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = list(Path(directory).glob("*.deb"))
        if not found:
            raise RuntimeError("perf_analyzer needs libb64.so.0d and apt-get can't fetch it: install the package libb64-0d")
        subprocess.run(["dpkg", "-x", str(found[0]), str(VENV / "debian")], check=True)


def family(pid: int) -> list[int]:
    """A process and its children."""
    listed = [Path(f"/proc/{pid}/task/{task.name}/children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [pid, *(child for children in listed for c in children.split() for child in family(int(c)))]


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def ended(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


class Died(RuntimeError):
    """A client ended with a status other than 0, or below 0 by a signal."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"the client ended with status {status}: {said}")
        self.status = status


class Load:
    """A client process under way, and the CPU that it and the server use while its load is steady."""

    def __init__(self, command: list[str], server: int, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._server = server
        self._shares: list[tuple[float, float]] = []  # cores that server and client used, a tenth of a second each
        self._over = threading.Event()
        self._alone = False  # the server ended first
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        span = 0.1
        server, client = family(self._server), self._process.pid

        def used() -> tuple[float, float]:
            return sum(cpu(pid) for pid in server), cpu(client)

        before, since = used(), time.monotonic()
        while not self._over.wait(span):
            if ended(self._server):  # perf_analyzer would wait for answers for ever
                self._alone = True
                self._process.kill()
                return
            try:
                now, at = used(), time.monotonic()
            except (OSError, IndexError):  # the client has ended
                return
            self._shares.append(((now[0] - before[0]) / (at - since), (now[1] - before[1]) / (at - since)))
            before, since = now, at

    def output(self) -> str:
        """What the client printed. Raises Died with it where the client failed, RuntimeError where the server did."""
        text, _ = self._process.communicate()
        self._over.set()
        self._watcher.join()
        if self._alone:
            raise RuntimeError("the server ended while it was asked")
        if self._process.returncode:
            raise Died(self._process.returncode, text[-3000:].strip() or "it said nothing")
        return text

    def cores(self) -> tuple[float, float]:
        """Cores that server and client used while the load was on: the mean of the spans in which the server was busy. The client
        is busy before that too, with its imports."""
        most = max((server for server, _ in self._shares), default=0.0)
        busy = [share for share in self._shares if share[0] >= most / 3][1:-1]
        if not busy:
            return 0.0, 0.0
        return sum(s for s, _ in busy) / len(busy), sum(c for _, c in busy) / len(busy)


def command(model: str, port: int, callers: int, window: float, file: Path, binary: Path, options: tuple[str, ...]) -> list[str]:
    """A closed loop of `callers`, three windows of `window` seconds, whatever their spread; a report as CSV."""
    load = () if "--request-rate-range" in options else ("--concurrency-range", str(callers))
    return [
        str(binary), "-m", model, "-u", f"127.0.0.1:{port}", "-i", "grpc", "--async", *load,
        "--measurement-interval", str(int(window * 1000)), "--max-trials", "3", "--stability-percentage", "999", "--percentile", "99",
        "-f", str(file), *options,
    ]  # fmt: skip


def report(file: Path) -> tuple[float, float, float]:
    """Calls a second, p50 and p99 in ms, from perf_analyzer's CSV."""
    with file.open() as lines:
        row = next(csv.DictReader(lines))
    return float(row["Inferences/Second"]), float(row["p50 latency"]) / 1e3, float(row["p99 latency"]) / 1e3


def analysed(model: str, port: int, server: int, callers: int, window: float, options: tuple[str, ...] = ()) -> Measured:
    """One pass of perf_analyzer against a server; another where a signal ends it, since a client's crash says
    nothing of the server. Raises RuntimeError where it fails, with what it printed."""
    try:
        return _analysed(model, port, server, callers, window, options)
    except Died as e:
        if e.status > 0:
            raise
        return _analysed(model, port, server, callers, window, options)


def _analysed(model: str, port: int, server: int, callers: int, window: float, options: tuple[str, ...]) -> Measured:
    binary, environment = perf_analyzer()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "report.csv"
        load = Load(command(model, port, callers, window, file, binary, options), server, environment)
        text = load.output()
        if not file.exists():
            raise RuntimeError(f"perf_analyzer wrote no report: {text[-3000:]}")
        rate, p50, p99 = report(file)
    ours, its = load.cores()
    return Measured(rate, p50, p99, ours / rate * 1e6, its / rate * 1e6)
