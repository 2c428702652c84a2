"""A caption translated, its pieces as they are settled, and a heat map of where the decoder looked for each. Start a server
first: make serve. The picture needs matplotlib (pip install matplotlib); `seqserve translate --attention-png` draws it too.

python docs/examples/translate.py [HOST:PORT [PICTURE.png [TEXT]]]
"""

import sys

from seqserve import Client


def main(server: str = "localhost:8001", picture: str = "attention.png", text: str = "A girl in a red coat feeds the birds.") -> None:
    with Client(server) as client:
        for piece in client.translate_stream(text, attention=True):
            print(piece.text, end="", flush=True)
            whole = piece.done
        assert whole is not None, "the last piece has the whole"
        print(f"\n{whole.timing}")
    for token, weights in zip(whole.tokens, whole.attention, strict=True):  # attention: tokens × source tokens, rows sum to 1
        print(f"{token.piece:>12} ← {whole.source_tokens[int(weights.argmax())]}  {weights.max():.0%}")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 0.45 * len(whole.source_tokens), 1 + 0.35 * len(whole.tokens)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(whole.attention, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(whole.source_tokens)), whole.source_tokens, rotation=60, ha="right")
    axes.set_yticks(range(len(whole.tokens)), [token.piece for token in whole.tokens])
    figure.savefig(picture, dpi=120)
    print(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
