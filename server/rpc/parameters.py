"""What an Open Inference request says beside its tensors: sequence, deadline, priority, how a stream is to end.

Knows the protocol's names for these; it must not know models or engines.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos import inference_pb2 as pb
from server.errors import InvalidInput, listed
from server.shares import DEFAULT, LEVELS, Claim

if TYPE_CHECKING:
    from server.rpc.answer import Asked

SERVICE = "inference.GRPCInferenceService"
_EMPTY_FINAL = "triton_enable_empty_final_response"
FINAL = "triton_final_response"


@dataclass(slots=True)
class Parameters:
    """The parameters of one request, checked. Others than these are a task's own, or nobody's."""

    sequence: str = ""  # its id; "": the request stands alone
    start: bool = False
    end: bool = False
    turn: int | None = None
    timeout: int = 0  # microseconds; 0: none
    priority: int = 0  # 1 is the highest; 0, and whatever there is no class for: the default
    final: bool = False  # a stream's responses say which is the last, with an empty one where need be

    def deadline(self, callers: float | None) -> float | None:
        """The sooner of the call's own deadline and what `timeout` allows, on `time.monotonic`'s clock."""
        if not self.timeout:
            return callers
        own = time.monotonic() + self.timeout * 1e-6
        return own if callers is None else min(own, callers)

    def claim(self, asked: Asked, lasting: bool = False) -> Claim:
        """What the request may claim of a model's queue; a `lasting` one is run however long it takes."""
        level = self.priority if 0 < self.priority <= LEVELS else DEFAULT
        caller = asked.caller
        deadline = None if lasting else self.deadline(asked.deadline)
        return Claim(deadline, level if caller is None else caller.tenant.level(level), asked.flow)


NONE = Parameters()
"""Of a request that says nothing."""
_ONLY_FINAL = Parameters(final=True)


def read(request: pb.ModelInferRequest) -> Parameters:
    """Raises InvalidInput naming the parameter that is none, or is of another type than it should be."""
    given = request.parameters
    if not given:
        return NONE
    if len(given) == 1 and _EMPTY_FINAL in given:  # all that perf_analyzer says where there is no sequence
        return _ONLY_FINAL if flag(_EMPTY_FINAL, given[_EMPTY_FINAL]) else NONE
    result = Parameters()
    for name, value in given.items():
        if name == _EMPTY_FINAL:
            result.final = flag(name, value)
        elif name == "sequence_id":
            result.sequence = _sequence(value)
        elif name == "sequence_start":
            result.start = flag(name, value)
        elif name == "sequence_end":
            result.end = flag(name, value)
        elif name == "turn":
            result.turn = whole(name, value)
        elif name == "timeout":
            result.timeout = whole(name, value)
        elif name == "priority":
            result.priority = whole(name, value)
        elif name.startswith("triton_"):
            known = listed([_EMPTY_FINAL])
            message = f"parameter {name!r}: names that begin with triton_ are the protocol's own, and of these only {known} is known"
            raise InvalidInput("UNKNOWN_PARAMETER", message, parameter=name, known=known)
    if not result.sequence and (result.start or result.end):
        raise InvalidInput("BAD_SEQUENCE_ID", "a sequence starts and ends by its sequence_id, a number other than 0 or a text")
    return result


def flag(name: str, value: pb.InferParameter) -> bool:
    if value.WhichOneof("parameter_choice") != "bool_param":
        raise _bad(name, "true or false, in bool_param")
    return value.bool_param


def whole(name: str, value: pb.InferParameter) -> int:
    """A number from 0, signed or not on the wire."""
    kind = value.WhichOneof("parameter_choice")
    number = value.int64_param if kind == "int64_param" else value.uint64_param if kind == "uint64_param" else -1
    if number < 0:
        raise _bad(name, "a whole number from 0, in int64_param or uint64_param")
    return number


def number(name: str, value: pb.InferParameter) -> float:
    kind = value.WhichOneof("parameter_choice")
    if kind not in ("double_param", "int64_param", "uint64_param"):
        raise _bad(name, "a number")
    return float(getattr(value, kind))


def _sequence(value: pb.InferParameter) -> str:
    """The id of a sequence; "" for 0 and for an empty text, by which the protocol means none."""
    kind = value.WhichOneof("parameter_choice")
    if kind == "string_param":
        return value.string_param
    if kind == "int64_param":
        number = value.int64_param
    elif kind == "uint64_param":
        number = value.uint64_param
    else:
        raise _bad("sequence_id", "a number or a text")
    return str(number) if number else ""


def _bad(name: str, wanted: str) -> InvalidInput:
    return InvalidInput("BAD_PARAMETER", f"parameter {name!r} must be {wanted}", parameter=name, expected=wanted)
