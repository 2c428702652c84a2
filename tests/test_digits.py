"""Digits: the data, images distorted, a made-up task learnt, exported, served row by row, and the example in docs."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from contract import bundle
from export import bundling
from seqserve import Client, errors
from tests.process import ROOT, Served, serve
from training import __main__ as command
from training import checkpoint, digits
from training.data import DataError, mnist


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the bundle of a toy run, trained here."""
    run, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("models")
    assert command.main(["digits", "--config", "toy", "--no-progress", "--set", "data.length=28", "--out", str(run)]) == 0
    assert checkpoint.load(run).scores["validation_accuracy"] > 0.9
    bundling.export(run, out / "digits" / "1")
    return out


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with serve(models) as server:
        yield server


def test_the_bundle_says_what_it_promises(models: Path) -> None:
    """Greys of bytes in, probabilities after all rows and after each out, the layers' states carried, proved cut and batched."""
    found = bundle.load(models / "digits" / "1")
    assert (found.kind, found.task["labels"]) == ("tensors", list("0123456789"))
    assert found.graph.cut
    assert found.graph.shared
    assert found.verified["step"]["batched_is_alone"]
    assert found.verified["step"]["cut_is_whole"]
    (rows,) = found.graph.inputs
    assert (rows.dtype, rows.axes) == ("uint8", ("batch", "time", 28))


def test_a_digit_drawn_in_turns_is_the_digit_sent_whole(served: Served) -> None:
    """However its rows are dealt out over turns, the probabilities after each are those of one call, bit for bit."""
    images = digits.recall(8, 28, 63, 5)
    random = np.random.default_rng(0)
    with Client(f"localhost:{served.port}") as client:
        whole = client.infer("digits", {"rows": images.images})
        for place, image in enumerate(images.images):
            ends = sorted({*random.integers(1, 28, 3).tolist(), 28})
            with client.session("digits") as session:
                for start, end in zip([0, *ends], ends, strict=False):
                    answer = session.send({"rows": image[None, start:end]})
                    assert np.array_equal(answer["probabilities"][0], whole["by_row"][place, end - 1])
            assert np.array_equal(answer["probabilities"][0], whole["probabilities"][place])
        assert (whole["probabilities"].argmax(-1) == images.labels).all()


def test_a_wrong_image_is_refused(served: Served) -> None:
    """Rows of another width, and more rows than an image has, are told so."""
    with Client(f"localhost:{served.port}") as client:
        for shape in ((1, 28, 27), (1, 29, 28), (1, 0, 28)):
            with pytest.raises(errors.InvalidInput):
                client.infer("digits", {"rows": np.zeros(shape, np.uint8)})


def test_the_example_runs(served: Served) -> None:
    """docs/examples/digits.py draws its seven, an answer beside every row, the same in one call."""
    ran = subprocess.run(
        [sys.executable, ROOT / "docs" / "examples" / "digits.py", f"localhost:{served.port}"], capture_output=True, text=True,
        timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 29
    assert "the same bits: True" in ran.stdout


def test_distortion_is_bounded_and_seeded() -> None:
    """No limits: the image itself. A shift moves ink by no more than it says; the same seed gives the same images."""
    images = torch.zeros(50, 28, 28, dtype=torch.uint8)
    images[:, 14, 14] = 255
    assert torch.allclose(digits.distorted(images, 0, 0, 0), images.float(), atol=1e-2)
    torch.manual_seed(1)
    moved = digits.distorted(images, 2.0, 0, 0)
    for row, column in (moved / moved.sum((1, 2), keepdim=True)).nonzero()[:, 1:].tolist():
        assert max(abs(row - 14), abs(column - 14)) <= 3  # two pixels, and what a fraction of one spreads to
    assert not torch.equal(moved[0], moved[1])
    torch.manual_seed(1)
    assert torch.equal(digits.distorted(images, 2.0, 0, 0), moved)


def test_only_the_first_row_of_made_up_images_tells() -> None:
    """The stroke's place is the label, and the noise after it never as dark."""
    found = digits.recall(200, 6, 63, 0)
    assert (found.images[:, 0].argmax(-1) == 4 + 2 * found.labels).all()
    assert (found.images[:, 0] > 0).sum(-1).tolist() == [2] * 200
    assert found.images[:, 1:].max() <= 63


def test_inputs_are_standardised_by_the_training_part(tmp_path: Path) -> None:
    """Mean and deviation are in the model, so that callers send greys as they are; without, greys are shares of 255."""
    from training import config

    made = digits.prepare(config.load("digits", "toy"), None, tmp_path)
    images = made.train_images.images.float()
    dims = made.model.dims
    assert isinstance(dims, digits.Dims)
    assert (dims.mean, dims.deviation) == pytest.approx((float(images.mean()), float(images.std())), rel=1e-4)
    raw = digits.Digits(replace(dims, mean=0.0, deviation=1.0))
    raw.load_state_dict(made.model.state_dict())
    torch.testing.assert_close(made.model(images[:3])[0], raw((images[:3] - dims.mean) / dims.deviation)[0])
    plain = digits.prepare(config.load("digits", "toy", ["data.standardise=false"]), None, tmp_path).model.dims
    assert isinstance(plain, digits.Dims)
    assert (plain.mean, plain.deviation) == (0.0, 255.0)


def test_damaged_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another checksum, another format and other counts are told, each."""

    def put(what: str, kind: int, content: bytes) -> None:
        """A file of one axis with four bytes to it, which the loader is told to trust."""
        name = f"t10k-{what}-ubyte.gz"
        packed = gzip.compress(struct.pack(">HBBI", 0, kind, 1, 4) + content)
        (tmp_path / name).write_bytes(packed)
        monkeypatch.setitem(mnist.SHA256, name, hashlib.sha256(packed).hexdigest())

    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"other")
    with pytest.raises(DataError, match="damaged"):
        mnist.load("test", tmp_path)
    put("images-idx3", 13, b"abcd")
    with pytest.raises(DataError, match="no idx file"):
        mnist.load("test", tmp_path)
    put("images-idx3", 8, b"abcd")
    put("labels-idx1", 8, b"abcd")
    with pytest.raises(DataError, match="images"):
        mnist.load("test", tmp_path)
