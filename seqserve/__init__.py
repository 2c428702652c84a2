"""seqserve: the client of the server for ONNX models that remember.

    with seqserve.Client("localhost:8001") as client:
        client.classify("A film to remember.")
        client.translate("A dog runs along the beach.", target="de", beam=5)
        client.forecast(observations)  # steps × channels

`AsyncClient` is the same for asyncio. What goes wrong is a `seqserve.Error`; see `seqserve.errors` for the tree.
"""

from seqserve.aio import AsyncClient
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
    TooLarge,
    Unavailable,
)
from seqserve.results import (
    Classification,
    Forecast,
    Inference,
    Model,
    ModelMetadata,
    ServerMetadata,
    TensorMetadata,
    Timing,
    Token,
    Translation,
    TranslationPiece,
)

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Classification",
    "Client",
    "DeadlineExceeded",
    "Denied",
    "Error",
    "FailedPrecondition",
    "Forecast",
    "Inference",
    "InvalidInput",
    "Model",
    "ModelMetadata",
    "NotFound",
    "Overloaded",
    "ServerError",
    "ServerMetadata",
    "TensorMetadata",
    "Timing",
    "Token",
    "TooLarge",
    "Translation",
    "TranslationPiece",
    "Unavailable",
]
