"""Whether a device still works, asked when something failed there.

An illegal address, an uncorrectable memory fault or a link that fell off ends what CUDA has of a device in this process: all that is
asked of it afterwards fails, for as long as the process lives. Running out of memory does not, nor does an input that a model can't run.
By the words of an error these can't be told apart; by the smallest run there is, they can.

It knows devices and that something can be run there; it must not know onnxruntime.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from server.devices import Device
from server.errors import DeviceLost

Probe = Callable[[], bool]
"""The smallest run: whether it gave what it should. Raises what a failed run raises."""

_probes: dict[Device, Probe] = {}
_lost: dict[Device, str] = {}
_asking = threading.local()


def keep(device: Device, probe: Probe) -> None:
    """What a device is to be asked with from now on."""
    _probes[device] = probe
    _lost.pop(device, None)


def lost(device: Device) -> DeviceLost | None:
    """Why a device can't be used any more, or None where it can, or nobody knows how to ask it. Once lost it stays so."""
    if device not in _lost and device in _probes and not getattr(_asking, "now", False):  # the probe's own run fails too
        _asking.now = True
        try:
            if not _probes[device]():
                _lost[device] = "it computes nonsense"
        except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
            _lost[device] = str(e)[:300]
        finally:
            _asking.now = False
    if device not in _lost:
        return None
    message = f"device {device} can't be used any more, and the server ends for that: send the request again ({_lost[device]})"
    return DeviceLost("DEVICE_LOST", message, device=device)
