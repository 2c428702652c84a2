"""What a request costs the HTTP face: CPU of the web process and of the server behind it, over one connection that is kept.

python -m tests.figures.web_cost
"""

from __future__ import annotations

import argparse
import http.client
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tests.process import ROOT, serve, web
from tests.rest import answer

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
SERIES = np.zeros((96, 7), np.float32)


def cpu(process: int) -> float:
    """Seconds of CPU that a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=3000)
    options = parser.parse_args()
    tokens = {"name": "tokens", "datatype": "INT64", "shape": [1, 8], "data": list(range(10, 18))}
    binary = np.arange(10, 18, dtype=np.int64).tobytes()
    head = b'{"inputs":[{"name":"tokens","datatype":"INT64","shape":[1,8],"parameters":{"binary_data_size":64}}],'
    head += b'"parameters":{"binary_data_output":true}}'
    lengths = {"inference-header-content-length": str(len(head))}
    with serve(ROOT / "models") as served, web(f"127.0.0.1:{served.port}") as face:
        connection = http.client.HTTPConnection("localhost", face.port, timeout=60)

        def post(path: str, body: object, headers: Mapping[str, str] = {}) -> None:
            reply = answer(connection, "POST", path, body, headers)
            assert reply.status in (200, 201), reply

        post("/v1/sessions", {"model": "sentiment", "session": "s"})
        kinds: Mapping[str, Callable[[int], None]] = {
            "healthz, no call behind": lambda _: _get(connection, "/healthz"),
            "health/live, the least call": lambda _: _get(connection, "/v2/health/live"),
            "infer, 8 tokens, JSON": lambda _: post("/v2/models/sentiment/infer", {"inputs": [tokens]}),
            "infer, 8 tokens, binary": lambda _: post("/v2/models/sentiment/infer", head + binary, lengths),
            "classify, one text": lambda _: post("/v1/classify", {"texts": ["A film to remember, and to see again."]}),
            "a session's turn, a word": lambda i: post("/v1/sessions/s/turns", {"turn": i + 1, "acknowledged": i, "text": "good "}),
            "forecast, 96 × 7 in, 96 × 7 × 9 out": lambda _: post("/v1/forecast", {"observations": SERIES.tolist()}),
        }
        print(f"{'request':38} {'web, µs':>9} {'server, µs':>11} {'a second':>9}")
        for name, ask in kinds.items():
            count = options.requests if "forecast" not in name else options.requests // 10
            begun, before = time.perf_counter(), (cpu(face.process.pid), cpu(served.process.pid))
            for i in range(count):
                ask(i)
            took = time.perf_counter() - begun
            used = [(after - b) / count * 1e6 for after, b in zip((cpu(face.process.pid), cpu(served.process.pid)), before, strict=True)]
            print(f"{name:38} {used[0]:9.0f} {used[1]:11.0f} {count / took:9.0f}", flush=True)
        connection.close()


def _get(connection: http.client.HTTPConnection, path: str) -> None:
    assert answer(connection, "GET", path, None, {}).status == 200


if __name__ == "__main__":
    main()
