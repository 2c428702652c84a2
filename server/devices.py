"""Where a graph's rounds run: the CPU, or a GPU by its number. What is asked for on the command line, as data.

Pure; whether such a device is there is graph.py's to find out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One place to run rounds at."""

    kind: str = "cpu"  # cpu or cuda
    index: int = 0

    @property
    def near(self) -> bool:
        """Whether its memory is this process's own."""
        return self.kind == "cpu"

    def __str__(self) -> str:
        return self.kind if self.near else f"{self.kind}:{self.index}"


CPU = Device()
AUTO = "auto"


def parse(text: str) -> tuple[Device, ...]:
    """`cpu`, `cuda`, `cuda:1`, `cuda:0,cuda:1`; `auto` gives nothing, and is the caller's to settle. Raises ValueError."""
    if text == AUTO:
        return ()
    devices = tuple(_one(part.strip()) for part in text.split(","))
    if len(set(devices)) < len(devices):
        raise ValueError(f"--device {text!r} names a device twice")
    if len({d.kind for d in devices}) > 1:
        raise ValueError(f"--device {text!r} mixes kinds: name CPUs or GPUs, not both")
    return devices


def _one(text: str) -> Device:
    kind, colon, index = text.partition(":")
    if kind == "cpu" and not colon:
        return CPU
    if kind == "cuda" and (not colon or (index.isdecimal() and len(index) < 4)):
        return Device("cuda", int(index or 0))
    raise ValueError(f"--device {text!r}: use cpu, cuda, cuda:N, several of these with commas, or auto")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the graphs of a catalog run, and how: one engine of each model for each device."""

    devices: tuple[Device, ...] = (CPU,)
    banks: bool = False  # states lie in banks on the device between rounds; else where rounds left them, in this process's memory
    room: int = 1 << 30  # bytes of state that a graph keeps on a device at most
    sessions: int = 20_000  # that are to fit, where `room` allows
    buckets: bool = False  # a round's rows are made up to a size met before, by rows that nobody reads
    captured: bool = False  # rounds of one step are captured as CUDA graphs
    tf32: bool = False  # float32 products may round their factors to 10 bits
