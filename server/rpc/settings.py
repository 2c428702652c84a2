"""TraceSetting and LogSettings: what is traced (nothing) and what is logged, and how to change the latter."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from protos import inference_pb2 as pb
from server.errors import InvalidInput, Unsupported, listed
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.rpc.parameters import SERVICE

_SWITCHES = ("log_info", "log_warning", "log_error")
_FIXED = {"log_file": "", "log_format": "default"}  # to the standard error stream, always
_VERBOSE = "log_verbose_level"


class Settings:
    """The root logger's level, in the protocol's words."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/TraceSetting": desk.unary(pb.TraceSettingRequest, self.trace),
            f"/{SERVICE}/LogSettings": desk.unary(pb.LogSettingsRequest, self.log, operator=True),
        }

    def trace(self, request: pb.TraceSettingRequest, answer: Answer) -> None:
        for name, setting in request.settings.items():
            if setting.value and not (name == "trace_level" and list(setting.value) == ["OFF"]):
                message = f"{name} can't be {listed(setting.value)}: this server traces nothing, its times are in responses and metrics"
                raise Unsupported("NO_TRACE", message, setting=name)
        response = pb.TraceSettingResponse()
        response.settings["trace_level"].value.append("OFF")
        answer.done(response)

    def log(self, request: pb.LogSettingsRequest, answer: Answer) -> None:
        with self._lock:
            now = _now()
            wanted = dict(now)
            for name, setting in request.settings.items():
                wanted[name] = _wanted(name, setting, now)
            if wanted != now:
                logging.getLogger().setLevel(_level(wanted))
                wanted = _now()
        response = pb.LogSettingsResponse()
        for name, value in wanted.items():
            given = response.settings[name]
            if isinstance(value, bool):
                given.bool_param = value
            elif isinstance(value, int):
                given.uint32_param = value
            else:
                given.string_param = value
        answer.done(response)


def _now() -> dict[str, bool | int | str]:
    level = logging.getLogger().getEffectiveLevel()
    return {
        **_FIXED,
        "log_info": level <= logging.INFO,
        "log_warning": level <= logging.WARNING,
        "log_error": level <= logging.ERROR,
        _VERBOSE: int(level <= logging.DEBUG),
    }


def _wanted(name: str, setting: pb.LogSettingsRequest.SettingValue, now: Mapping[str, bool | int | str]) -> bool | int | str:
    """Raises InvalidInput or Unsupported where it can't be had."""
    kind = setting.WhichOneof("parameter_choice")
    if name not in now:
        raise InvalidInput("UNKNOWN_SETTING", f"there is no log setting {name!r}; there are: {listed(now)}", setting=name)
    if kind is None:
        return now[name]
    expected = "bool_param" if name in _SWITCHES else "uint32_param" if name == _VERBOSE else "string_param"
    if kind != expected:
        raise InvalidInput("BAD_SETTING", f"log setting {name!r} comes in {expected}, not {kind}", setting=name, expected=expected)
    value: bool | int | str = getattr(setting, kind)
    if name in _FIXED and value != _FIXED[name]:
        raise Unsupported("FIXED_SETTING", f"{name} can't be changed: the server logs to its standard error stream", setting=name)
    return min(value, 1) if name == _VERBOSE and isinstance(value, int) else value


def _level(wanted: Mapping[str, bool | int | str]) -> int:
    """The one level that a choice of switches means. Raises InvalidInput for a choice that is none, such as info without error."""
    if wanted[_VERBOSE]:
        return logging.DEBUG
    switches = tuple(bool(wanted[name]) for name in _SWITCHES)
    levels = {
        (True, True, True): logging.INFO,
        (False, True, True): logging.WARNING,
        (False, False, True): logging.ERROR,
        (False, False, False): logging.CRITICAL,
    }
    if switches not in levels:
        message = "log_info includes log_warning, and that log_error: what is more severe can't be off while the rest is on"
        raise InvalidInput("BAD_SETTING", message)
    return levels[switches]
