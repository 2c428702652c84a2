"""The server: bundles in, answers out. Imports contract and protos; never torch or onnx."""

VERSION = "0.1.0"
