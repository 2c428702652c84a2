"""The OpenAPI document says what is served, no more and no less, and what is served is what it says. docs/http.md's commands run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from starlette.routing import Route

from tests.figures import web_schema
from tests.process import ROOT, Web, serve, web
from tests.rest import Rest
from web import rest, tasks
from web.app import app
from web.config import Config
from web.openapi import document

DOCUMENT: dict[str, Any] = document([*tasks.ENDPOINTS, *rest.ENDPOINTS], 600.0)
PAGE = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def face() -> Iterator[Web]:
    with serve(ROOT / "models") as server, web(f"127.0.0.1:{server.port}") as made:
        yield made


def test_every_route_is_in_it() -> None:
    """Each path of /v1 and /v2, with each of its methods, and none besides."""
    served = {
        (route.path, method)
        for route in app(Config()).routes
        if isinstance(route, Route) and re.match(r"/v[12](/|$)", route.path)
        for method in (route.methods or set()) - {"HEAD"}
    }
    said = {(path, method.upper()) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert said == served


def test_it_is_whole() -> None:
    """Every reference leads somewhere, every component is referred to, every schema is one, operation ids are unique."""
    text = json.dumps(DOCUMENT)
    for reference in set(re.findall(r'"\$ref": "#/(.*?)"', text)):
        at: Any = DOCUMENT
        for part in reference.split("/"):
            at = at[part]
    for kind in ("schemas", "responses", "parameters"):
        unused = [name for name in DOCUMENT["components"][kind] if f"#/components/{kind}/{name}" not in text]
        assert unused == []
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate({**schema, "$schema": "https://json-schema.org/draft/2020-12/schema"})
    ids = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


def test_it_is_served(face: Web) -> None:
    """At /openapi.json, unless it is not to be."""
    assert Rest(face.port).get("/openapi.json").json == DOCUMENT
    assert "/openapi.json" not in [route.path for route in app(Config(docs=False)).routes if isinstance(route, Route)]


def test_requests_made_from_it() -> None:
    """Good and bad requests of every operation: each answer is one that the document has, and none is the face's own fault."""
    outcome = web_schema.run(3, "fuzzing", 1)
    assert outcome.code == 0, outcome.said
    assert outcome.faults == ""
    assert outcome.requests > 100


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("http")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_pages_commands(command: str, face: Web, somewhere: Path) -> None:
    """Each curl of docs/http.md, in order, is answered well."""
    asked = command.replace("localhost:8000", f"localhost:{face.port}") + " --fail-with-body"
    ran = subprocess.run(["sh", "-c", asked], cwd=somewhere, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip()


def test_the_page_names_every_flag_it_has() -> None:
    """What docs/http.md calls a flag is one, with the default that it says."""
    flags = {f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--profile"}
    assert named <= flags
    for size, flag in re.findall(r"`(--max-[a-z-]+)` \| ([\d,.]+ ?(?:MiB|KiB)?)", PAGE):
        value = getattr(Config(), size[2:].replace("-", "_"))
        number, _, unit = flag.partition(" ")
        assert value == int(number.replace(",", "")) * {"MiB": 1 << 20, "KiB": 1 << 10, "": 1}[unit]
