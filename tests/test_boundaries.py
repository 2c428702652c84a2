"""The server starts and answers where torch and onnx are absent; the stubs are as the protos say."""

from __future__ import annotations

import subprocess
import sys

from protos.__main__ import stale
from tests.process import ROOT

BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "lightning", "onnxscript", "matplotlib"}:
            raise ModuleNotFoundError(f"{name} is absent in this test", name=name)
sys.meta_path.insert(0, Absent())
from pathlib import Path
from server.app import App
from server.config import Config
from seqserve import Client
app = App(Config(models=Path("models"), port=0, metrics_port=-1))
app.start()
with Client(f"localhost:{app.port}") as client:
    print(client.classify("A good film.").label)
app.stop()
"""


def test_no_torch_no_onnx() -> None:
    """A fresh interpreter in which torch, onnx and the training libraries can't be imported serves and answers."""
    ran = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "positive"


def test_stubs_are_current() -> None:
    """The committed stubs are what the committed .proto files give."""
    assert stale() == []
