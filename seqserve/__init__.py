"""seqserve: the client of the server for ONNX models that remember.

    with seqserve.Client("localhost:8001") as client:
        client.classify("A film to remember.")
        client.translate("A dog runs along the beach.", target="de", beam=5)
        client.forecast(observations)  # steps × channels

        with client.session("sentiment") as s:  # state stays on the server between calls
            s.send("A slow start, ")
            s.send("but the last hour is superb.")

`AsyncClient` is the same for asyncio. What goes wrong is a `seqserve.Error`; see `seqserve.errors` for the tree.
"""

from seqserve.aio import AsyncClient
from seqserve.aio_session import AsyncSession
from seqserve.client import Client
from seqserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Denied,
    Error,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    Overloaded,
    ServerError,
    SessionConflict,
    SessionGone,
    SessionNotFound,
    TooLarge,
    Unavailable,
)
from seqserve.results import (
    Classification,
    Forecast,
    Generation,
    GenerationPiece,
    Inference,
    Model,
    ModelMetadata,
    ServerMetadata,
    SessionInfo,
    Span,
    Symbol,
    Tagging,
    TensorMetadata,
    Tensors,
    Timing,
    Token,
    Translation,
    TranslationPiece,
)
from seqserve.session import Session

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "Cancelled",
    "Classification",
    "Client",
    "DeadlineExceeded",
    "Denied",
    "Error",
    "FailedPrecondition",
    "Forecast",
    "Generation",
    "GenerationPiece",
    "Inference",
    "InvalidInput",
    "Model",
    "ModelMetadata",
    "NotFound",
    "Overloaded",
    "ServerError",
    "ServerMetadata",
    "Session",
    "SessionConflict",
    "SessionGone",
    "SessionInfo",
    "SessionNotFound",
    "Span",
    "Symbol",
    "Tagging",
    "TensorMetadata",
    "Tensors",
    "Timing",
    "Token",
    "TooLarge",
    "Translation",
    "TranslationPiece",
    "Unavailable",
]
