"""CUDA's and cuDNN's shared libraries: loaded from Python wheels where the system has none, and told by name where one lacks.

Knows where wheels put them; it must not know onnxruntime, but for where it lies.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

ORDER = ("cudart", "nvJitLink", "cublasLt", "cublas", "nvrtc", "cufft", "curand", "cudnn")
"""What onnxruntime's CUDA part is linked against, each after what it needs itself."""


def elsewhere(home: Path) -> list[Path]:
    """NVIDIA's wheels' libraries, in order, where those wheels lie apart from the package at `home`: in the system's environment,
    say, when that is in a virtual one. onnxruntime itself looks beside itself only."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec is not None else []
    apart = [root for root in roots if root.resolve().parent != home.resolve().parent]
    return [file for name in ORDER for root in apart for file in sorted(root.glob(f"*/lib/lib{name}.so*"))]


def load(files: list[Path]) -> list[str]:
    """Load libraries for all that comes after; which could not be, and why."""
    failed = []
    for file in files:
        try:
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        except OSError as e:
            failed.append(str(e))
    return failed


def lacking(home: Path) -> str:
    """The library that onnxruntime's CUDA part lacks, by the loader's own words: its log, which would say so, is off."""
    for name in ("libcuda.so.1", *(str(home / "capi" / f"libonnxruntime_providers_{part}.so") for part in ("shared", "cuda"))):
        if failed := load([Path(name)]):
            return f"{failed[0]}; the driver comes with the system, CUDA and cuDNN with seqserve[gpu]"[:300]
    return "all its libraries are there: is the device's number right, and its driver new enough?"
