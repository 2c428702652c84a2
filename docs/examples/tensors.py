"""Plain tensors, and texts as tensors, by NVIDIA's own client: pip install tritonclient[grpc]. Nothing of seqserve is imported.
Start a server first: make serve.

python docs/examples/tensors.py [HOST:PORT]
"""

import sys

import numpy as np
import tritonclient.grpc as triton


def main(server: str = "localhost:8001") -> None:
    client = triton.InferenceServerClient(server)

    hour = np.arange(96)[:, None]
    window = triton.InferInput("window", [1, 96, 7], "FP32")  # rows × hours × channels
    window.set_data_from_numpy((10 + 3 * np.cos(hour / 24 * 2 * np.pi) + np.zeros((96, 7))).astype(np.float32)[None])
    mean = client.infer("window_mlp", [window]).as_numpy("mean")
    print("window_mlp:", mean.shape, "the next hours:", mean[0, :3, 0].round(2))

    text = triton.InferInput("TEXT", [2, 1], "BYTES")
    text.set_data_from_numpy(np.array([["A film to remember."], ["Two hours that I will not get back."]], object))
    answer = client.infer("sentiment", [text])
    for label, (_, positive) in zip(answer.as_numpy("LABEL")[:, 0], answer.as_numpy("probabilities"), strict=True):
        print(f"sentiment: {label.decode()}, {positive:.1%} positive")

    pieces = ("A small, warm film; ", "my whole family loved it, and we will watch it again.")
    for at, piece in enumerate(pieces):  # a sequence: the server keeps its state
        text = triton.InferInput("TEXT", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([[piece]], object))
        answer = client.infer("sentiment", [text], sequence_id=7, sequence_start=at == 0, sequence_end=at == 1)
        print(f"sequence 7: {answer.as_numpy('LABEL')[0, 0].decode()} after {piece!r}")
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
