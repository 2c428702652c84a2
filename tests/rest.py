"""Plain HTTP for tests: requests over a connection of their own, events as they come, and bare sockets."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def why(self) -> tuple[int, str]:
        """Status and reason of a refusal; the body must say the same status, and the detail something."""
        said = self.json
        assert said["status"] == self.status
        assert said["detail"]
        return self.status, said["reason"]


class Rest:
    """A face at a port of this machine; `headers` go with every request."""

    def __init__(self, port: int, **headers: str) -> None:
        self.port = port
        self._headers = _named(headers)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """`body`: bytes as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("localhost", self.port, timeout=WAIT_S)
        try:
            return answer(connection, method, path, body, {**self._headers, **_named(headers)})
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: object = b"", **headers: str) -> Reply:
        return self.ask("POST", path, body, **headers)

    def events(self, path: str, body: object, **headers: str) -> Iterator[tuple[str, Any]]:
        """Server-sent events as they come: name and data. Where the iterator is closed, so is the connection."""
        connection = http.client.HTTPConnection("localhost", self.port, timeout=WAIT_S)
        try:
            sent = {**self._headers, "accept": "text/event-stream", "content-type": "application/json", **_named(headers)}
            connection.request("POST", path, json.dumps(body).encode(), sent)
            response = connection.getresponse()
            assert (response.status, response.getheader("content-type")) == (200, "text/event-stream; charset=utf-8"), response.read()
            name = ""
            for raw in response:
                line = raw.decode().rstrip("\n")
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    yield name, json.loads(line[6:])
        finally:
            connection.close()


def answer(connection: http.client.HTTPConnection, method: str, path: str, body: object, headers: Mapping[str, str]) -> Reply:
    sent = dict(headers)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        sent.setdefault("content-type", "application/json")
    connection.request(method, path, body, sent)
    response = connection.getresponse()
    return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("localhost", port), timeout=WAIT_S) as bare:
        yield bare


def rest_of(bare: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    while part := bare.recv(65536):
        parts.append(part)
    return b"".join(parts)


def parsed(raw: bytes) -> Reply:
    """The first response in these bytes."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Reply(int(lines[0].split()[1]), headers, body[: int(headers.get("content-length", len(body)))])
