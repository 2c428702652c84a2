"""`make bench`: a served model under load, side by side in one run: our server, onnxruntime alone as the limit, a peer.

The client is perf_analyzer, NVIDIA's own, in C++; what it does not speak is asked by lean processes of ours
(bench_clients.py). Models A and B are bare ONNX files (bench_models.py), the workloads a table (bench_lines.py). All servers
run from the start and take turns line by line, so that drift of the machine meets them alike; every line is measured
several times, and the median told with its extremes. Speed is told and never judged: it fails where an answer is not, bit
for bit, what onnxruntime gives alone, or where a line could not be run. `--beside DIR` adds the server of another checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from protos import inference_pb2 as pb
from tests.figures import bench_bare as bare
from tests.figures.bench_lines import IDLE, LINES, Line, data, lengths
from tests.figures.bench_models import WIDTH, model_a, model_b
from tests.figures.bench_peer import peer
from tests.figures.bench_report import markdown, plot, summary
from tests.figures.bench_tools import Load, Measured, analysed, cpu, resident
from tests.process import ROOT, serve
from training.data import DataError, multi30k

PEER = "Triton, Python backend"


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test."""

    title: str
    port: int
    pid: int
    clients: frozenset[str] = frozenset({"perf_analyzer", "turns", "translate"})

    def sequences(self, model: str) -> bool:
        """Whether its configuration says that every call belongs to a sequence: then perf_analyzer sends no others."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            ask = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelConfig", pb.ModelConfigRequest.SerializeToString, pb.ModelConfigResponse.FromString
            )
            return bool(ask(pb.ModelConfigRequest(name=model)).config.HasField("sequence_batching"))


@dataclass(slots=True)
class Results:
    """All that was measured: passes by line and server, and the bare figures of the same run."""

    passes: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)
    bare: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # calls a second: one core, both cores
    chunk: list[float] = field(default_factory=list)  # ms of one round of 32 rows and 32 steps of A
    idle: dict[str, tuple[float, float]] = field(default_factory=dict)  # MB, share of a core
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bench:
    """What stays the same over a run."""

    directory: Path
    texts: list[str]
    window: float

    def files(self) -> None:
        """Write models and inputs."""
        model_a(self.models / "model_a" / "1" / "model.onnx")
        model_b(self.models / "model_b" / "1" / "model.onnx")
        (self.models / "translator").symlink_to(ROOT / "models" / "translator", target_is_directory=True)
        for which in ("10", "32", "128", "1–128", "IMDb"):
            self.inputs(which).write_text(json.dumps(data(lengths(which, 512))))
        (self.directory / "texts").write_text("\n".join(self.texts), encoding="utf-8")

    @property
    def models(self) -> Path:
        return self.directory / "models"

    def inputs(self, which: str) -> Path:
        return self.directory / f"{which}.json"

    def measure(self, line: Line, target: Target, results: Results) -> None:
        """One pass of a line against a server; adds to `results`."""
        if line.client == "perf_analyzer":
            options = (*line.options, *(("--input-data", str(self.inputs(line.lengths))) if line.lengths else ()))
            if line.model == "model_a" and target.sequences(line.model):  # each call a sequence of its own: begun and ended at once
                options += ("--sequence-length", "1", "--sequence-length-variation", "0")
            if line.lengths == "IMDb":
                self._probed(line, target, options, results)
                return
            measured = analysed(line.model, target.port, target.pid, line.callers, self.window, options)
        else:
            measured = self._own(line, target)
        results.passes.setdefault((line.name, target.title), []).append(measured)

    def _probed(self, line: Line, target: Target, options: tuple[str, ...], results: Results) -> None:
        """A line with short calls amid it, a hundred a second, from a client of their own."""
        found: list[Measured | Exception] = []
        ids = (*options[-4:], "--sequence-id-range", str(1 << 30)) if "--sequence-length" in options else ()

        def probe() -> None:
            more = ("--input-data", str(self.inputs("10")), "--request-rate-range", "100", "--max-threads", "1", *ids)
            try:
                found.append(analysed(line.model, target.port, target.pid, 1, self.window, more))
            except Exception as e:  # told by who joins this thread
                found.append(e)

        thread = threading.Thread(target=probe)
        thread.start()
        measured = analysed(line.model, target.port, target.pid, line.callers, self.window, options)
        thread.join()
        results.passes.setdefault((line.name, target.title), []).append(measured)
        if isinstance(found[0], Exception):
            raise found[0]
        results.passes.setdefault((f"{line.name} probe", target.title), []).append(found[0])

    def _own(self, line: Line, target: Target) -> Measured:
        command = [sys.executable, "-m", "tests.figures.bench_clients", line.client, "--port", str(target.port)]
        if line.client == "turns":
            command += ["--model", line.model, "--sessions", str(line.callers), "--seconds", str(3 * self.window)]
        else:
            seconds = ["--whole"] if self.window >= 1 else ["--seconds", str(3 * self.window)]
            command += ["--texts", str(self.directory / "texts"), "--callers", str(line.callers), *seconds]
        load = Load(command, target.pid)
        said = json.loads(load.output().splitlines()[-1])
        ours, its = load.cores()
        return Measured(said["rate"], said["p50"], said["p99"], ours / said["rate"] * 1e6, its / said["rate"] * 1e6)

    def limits(self, lines: list[Line], results: Results) -> None:
        """What onnxruntime alone does of the same work, now."""
        wanted = {line.bare for line in lines}
        of = {which: lengths(which, 128) for which in ("1–128", "IMDb")}
        for name, (work, calls) in bare.workloads(self.models, of).items():
            if name in wanted:
                seconds = self.window
                one, both = calls / bare.one_core(work, seconds), calls / bare.two_cores(work, seconds)
                results.bare.setdefault(name, []).append((one, both))
            if name == "A t=32" and any(line.lengths == "IMDb" for line in lines):
                results.chunk.append(bare.one_core(work, self.window / 2) * 1e3)
        if "translate" in wanted and self.texts:
            greedy = bare.Greedy(ROOT / "models" / "translator" / "1")
            results.bare.setdefault("translate", []).append((greedy.rate(self.texts, 1), greedy.rate(self.texts, 2)))

    def wrong(self, target: Target) -> Iterator[str]:
        """Answers that differ from what onnxruntime gives alone: of A at several lengths, of B over a few steps."""
        with grpc.insecure_channel(f"127.0.0.1:{target.port}") as channel:
            ask = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
            )
            a = bare.session(self.models / "model_a" / "1" / "model.onnx")
            calls = []
            for steps in (1, 5, 32, 33, 100, 128, 400):
                feeds = bare.tokens(1, steps)
                request = pb.ModelInferRequest(model_name="model_a", raw_input_contents=[feeds["tokens"].tobytes()])
                request.inputs.add(name="tokens", datatype="INT64", shape=(1, steps))
                request.outputs.add(name="logits")
                calls.append((steps, ask.future(request), a.run(["logits"], feeds)[0]))
            for steps, call, expected in calls:
                if call.result().raw_output_contents[0] != expected.tobytes():
                    yield f"{target.title}: A's answer to {steps} tokens differs from onnxruntime's"
            b = bare.session(self.models / "model_b" / "1" / "model.onnx")
            feeds = bare.step(1)
            for step in range(1, 8):
                feeds["x"] = np.random.default_rng(step).normal(size=(1, 1, WIDTH)).astype(np.float32)
                expected, feeds["h0"], feeds["c0"] = b.run(["y", "hn", "cn"], feeds)
                request = pb.ModelInferRequest(model_name="model_b", raw_input_contents=[feeds["x"].tobytes()])
                request.inputs.add(name="x", datatype="FP32", shape=(1, 1, WIDTH))
                request.outputs.add(name="y")
                request.parameters["sequence_id"].int64_param = 1 << 40
                request.parameters["sequence_start"].bool_param = step == 1
                request.parameters["sequence_end"].bool_param = step == 7
                if ask(request).raw_output_contents[0] != expected.tobytes():
                    yield f"{target.title}: B's answer to step {step} differs from onnxruntime's"


def idle(root: Path, seconds: float) -> tuple[float, float]:
    """MB that a server of three shipped models holds, and its share of a core, when nobody calls."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        for model in IDLE:
            (Path(name) / model).symlink_to(ROOT / "models" / model)
        served = stack.enter_context(serve(Path(name), root=root))
        time.sleep(seconds / 2)
        before = cpu(served.process.pid)
        time.sleep(seconds)
        return resident(served.process.pid) / 1e6, (cpu(served.process.pid) - before) / seconds


def run(options: argparse.Namespace, lines: list[Line], bench: Bench) -> Results:
    results = Results()
    flags = tuple(options.flags.split())
    trees = [("seqserve", ROOT), *((path.resolve().name, path.resolve()) for path in options.beside)]
    for title, root in trees:
        if any(line.client == "idle" for line in lines):
            results.idle[title] = idle(root, 5 * bench.window)
    lines = [line for line in lines if line.client != "idle"]
    if not lines:
        return results
    with ExitStack() as stack:
        targets = []
        for title, root in trees:
            served = stack.enter_context(serve(bench.models, *flags, root=root))
            targets.append(Target(title, served.port, served.process.pid))
        if not options.no_peer and any(line.model in ("model_a", "model_b") for line in lines):
            try:
                port, pid = stack.enter_context(peer(bench.models, bench.directory / "peer"))
                targets.append(Target(PEER, port, pid, frozenset({"perf_analyzer"})))
            except (RuntimeError, OSError, subprocess.CalledProcessError) as e:
                print(f"no peer: {e}")
        for target in (t for t in targets if t.title != PEER):
            try:
                results.failed += bench.wrong(target)
            except grpc.RpcError as e:
                results.failed.append(f"{target.title}: a checked call failed: {e.code().name} {e.details()}")
        for at in range(options.repeats):
            bench.limits(lines, results)
            for line in lines:
                for target in targets:
                    if line.client not in target.clients:
                        continue
                    try:
                        bench.measure(line, target, results)
                    except (RuntimeError, ValueError, KeyError, IndexError, grpc.RpcError) as e:
                        results.failed.append(f"{line.name} of {target.title}: {str(e).strip()[-600:]}")
                        continue
                    last = results.passes[line.name, target.title][-1]
                    print(
                        f"{at + 1}/{options.repeats} {line.name:13} {target.title[:10]:10} {last.rate:9,.0f}/s  p50 {last.p50:7.2f}  "
                        f"p99 {last.p99:7.2f} ms  server {last.server_us:6.1f} µs of CPU a call, client {last.client_us:5.1f}",
                        flush=True,
                    )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", action="append", choices=[line.name for line in LINES], help="this line; may be given again")
    parser.add_argument("--short", action="store_true", help="one quick pass")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each line")
    parser.add_argument("--window", type=float, default=1.5, help="seconds of one of a pass's three windows")
    parser.add_argument("--flags", default="", help="more flags for our server, such as '--chunk 16'")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="another checkout whose server runs too")
    parser.add_argument("--no-peer", action="store_true", help="only our server")
    parser.add_argument("--data", type=Path, help="directory of the data sets; multi30k is fetched where there is none")
    parser.add_argument("--out", type=Path, help="write Markdown here and a plot beside it (a full run: docs/bench.md)")
    options = parser.parse_args()
    if options.short:
        options.repeats, options.window = 1, min(options.window, 0.5)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lines = [line for line in LINES if not options.only or line.name in options.only]
    texts: list[str] = []
    failed = []
    if any(line.client == "translate" for line in lines):
        try:
            texts = multi30k.load("test_2016_flickr", "en", options.data)
        except DataError as e:
            failed.append(f"translation left out: {e}")
            lines = [line for line in lines if line.client != "translate"]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), texts, options.window)
        bench.files()
        results = run(options, lines, bench)
    results.failed += failed
    said = markdown(results, options.repeats, options.window)
    print(said)
    out = options.out or (None if options.short or options.only else ROOT / "docs" / "bench.md")
    if out:
        picture = out.with_suffix(".png")
        plot(results, picture)
        out.write_text(
            f"{said}\n\n![Calls a second of each workload, bare onnxruntime on one core being 1]({picture.name})\n", encoding="utf-8"
        )
    for fault in results.failed:
        print(f"FAILED {fault}")
    print(summary(results))
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
