"""Carriers: processes that carry calls to the server. What fronts promise is in test_front.py; here is what only carriers can do: die."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import grpc
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from server.rpc import relay
from server.rpc.front import Call, Options, unary
from server.rpc.relay_front import RelayFront
from tests import models
from tests.process import serve
from tests.test_front import CUT, WAIT_S, Latch


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


def _ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(WAIT_S * 1000))
