"""The Open Inference Protocol's REST face, /v2."""

from __future__ import annotations

from starlette.routing import BaseRoute


def routes() -> list[BaseRoute]:
    return []
