"""The published Python examples of the Triton client repository, run as they are, each in a process of its own. They are not part of
this project: a checkout's src/python/examples is named on the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("simple_grpc_infer_client.py", ()),
    ("simple_grpc_async_infer_client.py", ()),
    ("simple_grpc_aio_infer_client.py", ()),
    ("simple_grpc_string_infer_client.py", ()),
    ("simple_grpc_health_metadata.py", ()),
    ("simple_grpc_keepalive_client.py", ()),
    ("simple_grpc_custom_args_client.py", ()),
    ("grpc_client.py", ()),
    ("grpc_explicit_int_content_client.py", ()),
    ("grpc_explicit_int8_content_client.py", ()),
    ("grpc_explicit_byte_content_client.py", ()),
    ("simple_grpc_sequence_sync_infer_client.py", ()),
    ("simple_grpc_sequence_stream_infer_client.py", ()),
    ("simple_grpc_aio_sequence_stream_infer_client.py", ()),
    ("simple_grpc_sequence_sync_infer_client.py", ("--dyna",)),
    ("simple_grpc_sequence_stream_infer_client.py", ("--dyna",)),
    ("simple_grpc_aio_sequence_stream_infer_client.py", ("--dyna",)),
    ("simple_grpc_shm_client.py", ()),
    ("simple_grpc_shm_string_client.py", ()),
    ("reuse_infer_objects_client.py", ("-i", "grpc")),
    ("reuse_infer_objects_client.py", ("-i", "http")),
    ("simple_http_infer_client.py", ()),
    ("simple_http_async_infer_client.py", ()),
    ("simple_http_aio_infer_client.py", ()),
    ("simple_http_string_infer_client.py", ()),
    ("simple_http_health_metadata.py", ()),
    ("simple_http_sequence_sync_infer_client.py", ()),
    ("simple_http_sequence_sync_infer_client.py", ("--dyna",)),
    ("simple_http_shm_client.py", ()),
    ("simple_http_shm_string_client.py", ()),
    ("memory_growth_test.py", ()),
    ("simple_grpc_custom_repeat.py", ()),
    ("simple_grpc_model_control.py", ()),  # unloads `simple` and leaves it so
    ("simple_http_model_control.py", ()),
)
HTTP = "installation does not include http support"
CANNOT = {
    "grpc_client.py": "asks a densenet without a batch axis; every graph served has one",
    "memory_growth_test.py": "asks localhost:8001 and no other address",
    "--dyna": "an ONNX graph is never told its sequence's id, which this model must add to its last answer",
    "simple_http_model_control.py": "counts seven models, where simple_grpc_model_control.py counts eight; with seven it passes",
    "simple_grpc_custom_repeat.py": "repeat_int32 answers one request many times; an ONNX graph answers once",
}


def run_examples(directory: Path, url: str, http: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, what it is, PASS or FAIL or not offered, and why; an example passes where it ends with status 0 and says PASS, or
    says nothing of the kind in its source."""
    for name, more in EXAMPLES:
        title = " ".join(("example", name, *more))
        if why := next((said for mark, said in CANNOT.items() if mark in (name, *more)), ""):
            yield title, "published example", "not offered", why
            continue
        where = http if "http" in (*name.split("_"), *more) else url
        if not where:
            yield title, "published example", "not offered", "no REST face: --http HOST:PORT names one"
            continue
        file = directory / name
        if not file.exists():
            yield title, "published example", "FAIL", f"there is no {file}"
            continue
        try:
            done = subprocess.run(
                [sys.executable, str(file), "-u", where, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100
            )
        except subprocess.TimeoutExpired:
            yield title, "published example", "FAIL", "no end after 100 s"
            continue
        if HTTP in done.stdout:
            yield title, "published example", "not offered", "imports the HTTP client too, which is not installed here"
            continue
        right = done.returncode == 0 and ("PASS" in done.stdout or "PASS" not in file.read_text())
        yield title, "published example", "PASS" if right else "FAIL", "" if right else done.stdout[-400:]
