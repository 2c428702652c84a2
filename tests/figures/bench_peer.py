"""The peer of `make bench`: NVIDIA Triton 2.51 as nvidia-pytriton carries it, which has a Python backend and no ONNX Runtime one;
models A and B run in that backend through onnxruntime, one thread a run, two instances.

It is a real Triton, its front, batchers and sequence slots in C++, but each request crosses into Python: weaker than Triton
with its own ONNX Runtime backend, which no package index has. A's requests are cut into runs of equal length, since a whole
graph takes no padding; B's states are kept by sequence id.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.figures.bench_tools import VENV, installed

_A = """
import os
from collections import defaultdict

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as tools


class TritonPythonModel:
    def initialize(self, args):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.onnx = ort.InferenceSession(os.path.join(os.path.dirname(__file__), "model.onnx"), options)

    def execute(self, requests):
        tokens = [tools.get_input_tensor_by_name(r, "tokens").as_numpy() for r in requests]
        same = defaultdict(list)
        for at, t in enumerate(tokens):
            same[t.shape[1]].append(at)
        replies = [None] * len(requests)
        for places in same.values():
            fed = np.concatenate([tokens[at] for at in places])
            zero = np.zeros((1, len(fed), 256), np.float32)
            (out,) = self.onnx.run(["logits"], {"tokens": fed, "h0": zero, "c0": zero})
            for row, at in enumerate(places):
                replies[at] = tools.InferenceResponse([tools.Tensor("logits", out[row : row + 1])])
        return replies
"""
_B = """
import os

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as tools


class TritonPythonModel:
    def initialize(self, args):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.onnx = ort.InferenceSession(os.path.join(os.path.dirname(__file__), "model.onnx"), options)
        self.kept = {}
        self.zero = (np.zeros((2, 1, 256), np.float32),) * 2

    def execute(self, requests):
        def numbers(name):
            return [int(tools.get_input_tensor_by_name(r, name).as_numpy().item()) for r in requests]

        x = np.concatenate([tools.get_input_tensor_by_name(r, "x").as_numpy() for r in requests])
        ids, starts, ends = numbers("CORRID"), numbers("START"), numbers("END")
        states = [self.zero if start else self.kept[i] for i, start in zip(ids, starts)]
        h, c = (np.concatenate([s[k] for s in states], 1) for k in (0, 1))
        y, h, c = self.onnx.run(["y", "hn", "cn"], {"x": x, "h0": h, "c0": c})
        for row, (i, end) in enumerate(zip(ids, ends)):
            if end:
                self.kept.pop(i, None)
            else:
                self.kept[i] = (h[:, row : row + 1], c[:, row : row + 1])
        return [tools.InferenceResponse([tools.Tensor("y", y[row : row + 1])]) for row in range(len(ids))]
"""
_HEAD = 'backend: "python"\nmax_batch_size: 64\ninstance_group [{ count: 2 kind: KIND_CPU }]\n'
_CONFIG = {
    "model_a": _HEAD
    + """input [{ name: "tokens" data_type: TYPE_INT64 dims: [-1] allow_ragged_batch: true }]
output [{ name: "logits" data_type: TYPE_FP32 dims: [2] }]
dynamic_batching { }
""",
    "model_b": _HEAD
    + """input [{ name: "x" data_type: TYPE_FP32 dims: [1, 16] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [1, 16] }]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  oldest { max_candidate_sequences: 1024 }
  control_input [
    { name: "START" control [{ kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] }] },
    { name: "END" control [{ kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1] }] },
    { name: "CORRID" control [{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }] }
  ]
}
""",
}


@contextmanager
def peer(models: Path, directory: Path) -> Iterator[tuple[int, int]]:
    """Serve models A and B by the peer; its port and process. Raises RuntimeError where it can't be had."""
    installed()
    packages = next(VENV.glob("lib/python3*/site-packages"))
    triton = packages / "pytriton" / "tritonserver"
    stub = triton / "python_backend_stubs" / packages.parent.name.removeprefix("python") / "triton_python_backend_stub"
    if not stub.exists():
        raise RuntimeError(f"the peer's wheel has no stub for {packages.parent.name}")
    for name, code in (("model_a", _A), ("model_b", _B)):
        place = directory / "models" / name / "1"
        place.mkdir(parents=True)
        shutil.copy(models / name / "1" / "model.onnx", place)
        (place / "model.py").write_text(code)
        (place.parent / "config.pbtxt").write_text(_CONFIG[name])
    shutil.copytree(triton / "backends", directory / "backends")
    shutil.copy(stub, directory / "backends" / "python")
    command = [
        str(triton / "bin" / "tritonserver"), "--model-repository", str(directory / "models"), "--backend-directory",
        str(directory / "backends"), "--grpc-address", "127.0.0.1", "--grpc-port", str(port := _free()), "--allow-http=false",
        "--allow-metrics=false",
    ]  # fmt: skip
    libraries = f"{packages / 'nvidia_pytriton.libs'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    path = f"{VENV / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(packages), "LD_LIBRARY_PATH": libraries, "PATH": path}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if re.search(r"Started GRPCInferenceService", line):
            break
    else:
        process.wait()
        raise RuntimeError(f"the peer did not start: {''.join(said)[-2000:]}")
    reader = threading.Thread(target=process.stderr.read, daemon=True)  # a full pipe would stop it
    reader.start()
    try:
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free() -> int:
    """A port that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])
