"""What a connection lies on: a socket that never blocks, in the clear or with TLS. One thread at a time; sending and receiving under TLS
need the connection's lock, which the caller of `send` holds; `receive` takes it."""

from __future__ import annotations

import contextlib
import socket as sockets
import ssl
import threading


class Socket:
    """In the clear."""

    certificate: bytes | None = None

    def __init__(self, socket: sockets.socket) -> None:
        self.socket = socket
        self._unsent: list[memoryview | bytes] = []
        self.pending = 0  # bytes that the socket did not take yet

    def receive(self, most: int) -> bytes | None:
        """What has arrived; None if nothing, b"" at the end. Raises OSError."""
        try:
            return self.socket.recv(most)
        except BlockingIOError:
            return None

    def send(self, data: bytes) -> None:
        """Send, or keep what the socket doesn't take. Raises OSError."""
        if self.pending:
            self._unsent.append(data)
            self.pending += len(data)
            self.push()
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._unsent.append(memoryview(data)[sent:])
            self.pending = len(data) - sent

    def push(self) -> None:
        """Send on. Raises OSError."""
        unsent = self._unsent
        while unsent:
            first = memoryview(unsent[0])
            try:
                sent = self.socket.send(first)
            except BlockingIOError:
                return
            self.pending -= sent
            if sent < len(first):
                unsent[0] = first[sent:]
                return
            del unsent[0]

    def finish(self) -> None:
        """Say that nothing more comes. Raises OSError."""
        self.socket.shutdown(sockets.SHUT_WR)


class TlsSocket(Socket):
    """With TLS, by the standard library: OpenSSL between two buffers, so that nothing of it blocks."""

    def __init__(self, socket: sockets.socket, context: ssl.SSLContext, lock: threading.Lock) -> None:
        super().__init__(socket)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._lock = lock
        self._shaken = False
        self._early: list[bytes] = []  # to be sent once hands are shaken

    def receive(self, most: int) -> bytes | None:
        data = super().receive(most)
        if not data:
            return data
        plain = bytearray()
        with self._lock:
            self._in.write(data)
            try:
                if not self._shaken:
                    self._tls.do_handshake()
                    self._shaken = True
                    self.certificate = self._tls.getpeercert(True)
                    for early in self._early:
                        self._tls.write(early)
                    self._early.clear()
                while part := self._tls.read(most):
                    plain += part
                return b""
            except ssl.SSLZeroReturnError:
                return bytes(plain)
            except ssl.SSLWantReadError:
                return bytes(plain) or None
            finally:
                self._carry()

    def send(self, data: bytes) -> None:
        if not self._shaken:
            self._early.append(data)
            return
        self._tls.write(data)
        self._carry()

    def finish(self) -> None:
        with self._lock:
            if self._shaken:
                with contextlib.suppress(ssl.SSLError):  # the other end has not said so yet, or is gone
                    self._tls.unwrap()
                self._carry()
        super().finish()

    def _carry(self) -> None:
        """What OpenSSL wants to be sent."""
        if sealed := self._out.read():
            super().send(sealed)
