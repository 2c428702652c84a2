"""Generation on the wire: a caller's wishes read, symbols and texts written; the same for calls and for sessions' turns.

It knows messages and the task's values, no engine and no call.
"""

from __future__ import annotations

from contract.sampling import Manner
from protos import seqserve_pb2 as pb
from server.tasks.generate import Drawn, Generated, Wanted


def read_wishes(request: pb.GenerateRequest) -> Wanted:
    manner = Manner(request.temperature if request.HasField("temperature") else 1.0, request.top_k)
    return Wanted(manner, request.seed if request.HasField("seed") else None, request.max_symbols, tuple(request.stop))


def write_piece(symbol: Drawn) -> pb.GeneratePiece:
    return pb.GeneratePiece(text=symbol.text, token=_token(symbol))


def write_generated(result: Generated) -> pb.GenerateReply:
    """The reply without model and timing, so that the same text has the same bytes."""
    return pb.GenerateReply(
        text=result.text, tokens=map(_token, result.symbols), seed=result.seed, ended=result.ended, read=result.read,
        unknown=result.unknown,
    )  # fmt: skip


def _token(symbol: Drawn) -> pb.Token:
    return pb.Token(piece=symbol.piece, log_probability=symbol.log_probability)
