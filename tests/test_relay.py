"""Carriers: processes that carry calls to the server. What fronts promise is in test_front.py; here is what only carriers can do: die."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from server.rpc import relay
from server.rpc.carrier import Carrier
from server.rpc.front import Call, Options, unary
from server.rpc.relay import Lane
from server.rpc.relay_front import RelayFront
from tests import models
from tests.process import serve
from tests.test_front import CUT, WAIT_S, Latch
from tests.test_http2 import END_STREAM, HEADERS, READ_ALL, READ_NOTHING, Big, Wire, call, pinged


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2**32 - 1), st.binary(max_size=40)), max_size=8), st.data())
def test_frames_cut_anywhere_are_the_same(frames: list[tuple[int, int, bytes]], data: st.DataObject) -> None:
    whole = b"".join(relay.frame(*frame) for frame in frames)
    places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    reader = relay.Reader()
    parts = [whole[begin:end] for begin, end in zip([0, *places], [*places, len(whole)], strict=True)]
    found = [frame for part in parts if part for frame in reader.frames(part)]
    assert found == frames


def test_a_carrier_that_dies_is_replaced_and_its_calls_are_gone() -> None:
    """Killed amid calls: their handlers hear that they have gone, their callers may send again, and are served by the next carrier."""
    begun, gone = Latch(3), Latch(3)

    def hold(call: Call, request: bytes) -> None:
        call.on_gone(gone.down)
        begun.down()

    front = RelayFront({"/t.S/Hold": unary(hold), "/t.S/Echo": unary(lambda call, request: call.reply(request))}, Options(processes=1))
    port = front.listen("127.0.0.1:0")
    front.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            held = [channel.unary_unary("/t.S/Hold").future(b"") for _ in range(3)]
            assert begun.wait()
            [process] = front._carriers.values()
            process.kill()
            assert {call.code() for call in held} == {grpc.StatusCode.UNAVAILABLE}
            assert gone.wait()
        with grpc.insecure_channel(f"127.0.0.1:{port}", [CUT]) as channel:  # a connection that was not the dead one's
            assert channel.unary_unary("/t.S/Echo")(b"again", timeout=WAIT_S, wait_for_ready=True) == b"again"
        assert front.live == 0
    finally:
        front.stop(WAIT_S)


def test_carriers_end_with_their_server(tmp_path: Path) -> None:
    """However it ends: told to, with exit status 0, or killed. No process is left, and every caller is told something."""
    models.library(tmp_path)
    for how in (signal.SIGTERM, signal.SIGKILL):
        with serve(tmp_path, "--rpc-processes", "2") as server:
            live = server.method("/inference.GRPCInferenceService/ServerLive", pb.ServerLiveResponse)
            assert live(b"").live
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
            descriptors = [os.pidfd_open(int(child)) for child in children]
            assert len(children) == 2
            server.process.send_signal(how)
            assert server.process.wait(60) == (0 if how is signal.SIGTERM else -signal.SIGKILL)
            for descriptor in descriptors:
                with os.fdopen(descriptor) as file:  # readable once the process has ended
                    assert _ended(file.fileno())


def test_calls_wait_while_much_is_unread() -> None:
    """As with the direct front, in the carrier: what its callers leave unread is not asked for, and the server hears nothing of it."""
    big = Big(100_000)
    echo = unary(lambda call, request: call.reply(request))
    fail = unary(lambda call, request: call.fail(grpc.StatusCode.ABORTED, "no"))
    methods = {"/t.S/Big": unary(big), "/t.S/Echo": echo, "/t.S/Fail": fail}
    front = RelayFront(methods, Options(processes=1, unread_bytes=1_000_000))
    port = front.listen("127.0.0.1:0")
    front.start()
    wire = Wire(port)
    try:
        wire.send(READ_NOTHING + b"".join(call(i, b"%d" % i, path="/t.S/Big") for i in range(1, 41, 2)) + call(41, b"", path="/t.S/Fail"))
        for kind, flags, stream, _ in wire.frames():
            if kind == HEADERS and flags & END_STREAM:
                assert stream == 41  # told behind 20 answers, which the carrier has by now
                break
        wire.send(b"".join(call(i, b"%d" % i, path="/t.S/Big") for i in range(43, 143, 2)))
        pinged(wire)
        with grpc.insecure_channel(f"127.0.0.1:{port}", [CUT]) as channel:  # by the same lane, behind whatever was asked of the server
            assert channel.unary_unary("/t.S/Echo")(b"well", timeout=WAIT_S) == b"well"
        assert len(big.begun) == 20
        wire.send(READ_ALL)
        assert {len(body) for _, body in wire.answers(70).values()} == {100_005}
        assert big.begun == [b"%d" % i for i in range(1, 143, 2) if i != 41]
    finally:
        wire.close()
        front.stop(WAIT_S)


class Home:
    """A front, to a lane."""

    options = Options()
    draining = False

    def touch(self, connection: object) -> None:
        """Nobody waits: the test flushes."""


def test_a_server_takes_no_more_calls_of_a_carrier_that_does_not_read() -> None:
    """So many bytes of answers wait for it, and one more; it gets the others when it reads."""
    size, count = 1_000_000, 60
    big = Big(size)
    ours, its = socket.socketpair()
    ours.setblocking(False)
    lane = Lane(ours, [("/t.S/Big", unary(big))], Home())
    begins = [relay.frame(relay.BEGIN, 2 + i, relay.BEGINS.pack(0, 1, 0.0)) for i in range(count)]
    caller = relay.frame(relay.CALLER, 1, relay.marshal.dumps(((), "ipv4:127.0.0.1:1", None)))
    with ours, its:
        its.sendall(relay.READY + caller + b"".join(begins))
        assert lane.read()
        assert len(big.begun) == relay.MUCH // size + 1
        lane.flush()
        assert lane.stuck
        assert len(big.begun) == relay.MUCH // size + 1
        reader, answers = relay.Reader(), 0
        its.setblocking(False)
        while answers < count:
            try:
                answers += len(reader.frames(its.recv(1 << 20)))
            except BlockingIOError:
                lane.socket.push()
                lane.flush()
        assert len(big.begun) == count


@contextmanager
def carrier() -> Iterator[tuple[Carrier, socket.socket]]:
    """A carrier that nobody calls, and the server's end of its lane."""
    its, ours = socket.socketpair()
    ours.settimeout(WAIT_S)
    made = Carrier([], Options(), its)
    try:
        yield made, ours
    finally:
        ours.close()
        its.close()


def test_a_carrier_whose_server_is_gone_ends_quietly() -> None:
    """Also where the news is that nothing more can be written, at once or while it waits for room."""
    with carrier() as (made, ours):
        ours.close()
        made._tell(relay.GONE, 1)
        made._settle()
        assert made._stopping
    with carrier() as (made, ours):
        made._tell(relay.MESSAGE, 1, bytes(relay.MUCH + (4 << 20)))
        settling = threading.Thread(target=made._settle, daemon=True)
        settling.start()
        assert ours.recv(1000)
        ours.close()
        settling.join(WAIT_S)
        assert not settling.is_alive()
        assert made._stopping


def test_a_carrier_that_waits_for_its_server_reads_meanwhile() -> None:
    """Both have much to say at once: neither waits for the other for ever."""
    with carrier() as (made, ours):
        made._tell(relay.MESSAGE, 1, bytes(relay.MUCH + (4 << 20)))
        settling = threading.Thread(target=made._settle, daemon=True)
        settling.start()
        assert ours.recv(1000)
        ours.sendall(relay.frame(relay.ANSWER, 7, bytes(16 << 20)))  # of a call that is over: read and dropped
        reader = threading.Thread(target=lambda: [*iter(lambda: ours.recv(1 << 20), b"")], daemon=True)
        reader.start()
        settling.join(WAIT_S)
        assert not settling.is_alive()
        assert not made._stopping
        ours.shutdown(socket.SHUT_RD)
        reader.join(WAIT_S)


def _ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(WAIT_S * 1000))
