"""How the log is written: lines for people, or one JSON object a line for programs, with who called and about what.

It knows calls only as far as a line of the access log tells of them, and nothing of how they are answered.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from server.quotas import Caller
    from server.rpc.front import Call

access = logging.getLogger("seqserve.access")

TEXT = "%(asctime)s %(levelname)s %(message)s"
_REQUEST, _SESSION, _TRACE = "x-request-id", "seqserve-session", "traceparent"  # metadata that says what a call is about


def configure(level: str, form: str, stream: IO[str] | None = None) -> None:
    """Write all logs to `stream` (default: standard error), `form` being text or json."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    hush()


def hush() -> None:
    """No line of hpack's below info: its debug lines have every header that comes, keys among them."""
    logging.getLogger("hpack").setLevel(logging.INFO)


class JsonLines(logging.Formatter):
    """time (UTC, RFC 3339), level, logger, message, and of a call: method, peer, status, ms, request, session, tenant, trace."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        line.update(getattr(record, "call", {}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def ended(method: str, call: Call, caller: Caller | None, message: Message | None, status: str, seconds: float) -> None:
    """One line of the access log. `message` is the request, where the call has but one."""
    metadata = {key: value for key, value in call.metadata if isinstance(value, str)}
    trace = metadata.get(_TRACE, "").split("-")
    about = {
        "method": method, "peer": call.peer, "status": status, "ms": round(seconds * 1e3, 3),
        "request": metadata.get(_REQUEST) or _text(message, "id"),
        "session": _session(message) or metadata.get(_SESSION, ""),
        "tenant": caller.tenant.name if caller is not None else "",
        "trace": trace[1] if len(trace) == 4 else "",
    }  # fmt: skip
    said = "".join(f" {key} {value!r}" for key in ("request", "session", "tenant") if (value := about[key]))
    told = {key: value for key, value in about.items() if value != ""}
    access.info("%s %s %s %.1f ms%s", method, call.peer, status, seconds * 1e3, said, extra={"call": told})


def _session(message: Message | None) -> str:
    """The session that a request names: in a field of that name, or as the Open Inference Protocol's sequence."""
    if found := _text(message, "session"):
        return found
    parameters = getattr(message, "parameters", None)
    if parameters is None or "sequence_id" not in parameters:
        return ""
    sequence = parameters["sequence_id"]
    return str(getattr(sequence, sequence.WhichOneof("parameter_choice") or "string_param"))


def _text(message: Message | None, field: str) -> str:
    value = getattr(message, field, "")
    return value if isinstance(value, str) else ""
