"""Where CUDA's libraries are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import libraries


def test_wheels_that_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of NVIDIA's wheels are found on the path, each after what it needs; those beside onnxruntime are its own to find."""
    for where, names in (("system", ("cu13/lib/libcublas.so.13", "cu13/lib/libcudart.so.13", "cudnn/lib/libcudnn.so.9")), ("mine", ())):
        for name in names:
            file = tmp_path / where / "nvidia" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("not a library")
    monkeypatch.syspath_prepend(str(tmp_path / "system"))
    found = libraries.elsewhere(tmp_path / "mine" / "onnxruntime")
    assert [file.name for file in found] == ["libcudart.so.13", "libcublas.so.13", "libcudnn.so.9"]
    assert libraries.elsewhere(tmp_path / "system" / "onnxruntime") == []
    assert len(libraries.load(found)) == 3, "whatever they are, it goes on"


def test_what_lacks_is_told(tmp_path: Path) -> None:
    assert libraries.lacking(tmp_path / "onnxruntime").startswith(("libcuda.so.1", str(tmp_path)))
