"""A digit drawn row by row: after each row the server says what it takes it for. Start a server first: make serve.

python docs/examples/digits.py [HOST:PORT [MODEL]]
"""

import sys

import numpy as np

from seqserve import Client

SHADES = " ·+#"  # from paper to ink


def seven() -> np.ndarray:
    """A seven in grey, uint8 [28, 28]: a bar, then a stroke that leans, both with soft edges."""
    y, x = np.mgrid[0:28, 0:28]
    bar = np.abs(y - 6) / 1.8 + np.maximum(0, np.abs(x - 13.5) - 5.5)
    stroke = np.abs(x - (18.5 - 0.45 * (y - 6))) / 1.8 + np.maximum(0, np.abs(y - 14) - 8)
    return np.round(255 * np.clip(1.5 - np.minimum(bar, stroke), 0, 1)).astype(np.uint8)


def main(server: str = "localhost:8001", model: str = "digits") -> None:
    image = seven()
    with Client(server) as client:
        with client.session(model) as session:
            for row in image:
                answer = session.send({"rows": row[None, None]})  # one row of one image: [batch, time, width]
                chances = answer["probabilities"][0]
                drawn = "".join(SHADES[int(grey) * (len(SHADES) - 1) // 255] for grey in row)
                print(f"{drawn}  {chances.argmax()}  {chances.max():6.1%}")
        whole = client.infer(model, {"rows": image[None]})["probabilities"][0]  # the same in one call
        print("in one call, the same bits:", bool((whole == chances).all()))


if __name__ == "__main__":
    main(*sys.argv[1:])
