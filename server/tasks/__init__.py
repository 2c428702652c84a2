"""Text and series ↔ tensors: each task turns a request into one sequence and its outputs into an answer.

A task knows its bundle's vocabulary, scales and labels; it must not know protobuf or gRPC. `start` checks what it is
given, queues a sequence and returns it (to be cancelled by); `then` or `failed` is called later, from a worker.
"""
