"""Conformance with the Open Inference Protocol as tritonclient speaks it, for any server: `python -m tests.conformance --url HOST:PORT`.

Needs tritonclient[grpc] and numpy, nothing of seqserve: it must never import `protos`, whose `inference.proto` and tritonclient's
would claim the same names in one process. `python -m tests.conformance.models DIR` writes the models that cases ask for.
"""
