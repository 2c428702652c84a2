"""A text that goes on in several ways: the same beginning with other seeds, and how sure the model was of each. Start a server
first: make serve.

python docs/examples/generate.py [HOST:PORT [TEXT]]
"""

import math
import sys

from seqserve import Client


def main(server: str = "localhost:8001", text: str = "ROMEO:\nWhat light is this that") -> None:
    with Client(server) as client:
        for seed in range(3):
            print(f"--- seed {seed}\n{text}", end="")
            for piece in client.generate_stream(text, temperature=0.7, seed=seed, max_symbols=160, stop=["\n\n"]):
                print(piece.text, end="", flush=True)
                if piece.done is not None:
                    nats = -sum(s.log_probability for s in piece.done.symbols) / max(1, len(piece.done.symbols))
                    print(f"\n{nats:.2f} nats a symbol, ended by {piece.done.ended}")
        again = [client.generate(text, seed=7, max_symbols=40).text for _ in range(2)]
        print("the same seed, the same text:", again[0] == again[1])
        likeliest = client.generate(text, temperature=0, max_symbols=40)
        print(f"the likeliest: {likeliest.text!r}, {math.exp(likeliest.symbols[0].log_probability):.0%} sure of its first symbol")


if __name__ == "__main__":
    main(*sys.argv[1:])
