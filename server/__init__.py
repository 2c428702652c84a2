"""The server: bundles in, answers out. Imports contract and protos; never torch or onnx."""
