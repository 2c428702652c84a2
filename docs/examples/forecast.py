"""A forecast that follows a transformer hour by hour, and what it becomes after six hours of high load. Start a server first: make serve.

python docs/examples/forecast.py [HOST:PORT [MODEL]]
"""

import sys

import numpy as np

from seqserve import Client

LEVEL = np.array([9.0, 2.5, 6.0, 1.2, 2.8, 0.9, 14.0])  # six loads and the oil's temperature, as ETTh1 has them
SWING = np.array([5.0, 1.2, 4.5, 0.9, 0.7, 0.25, 3.0])
MORE = np.array([4, 1, 3.5, 0.7, 0.6, 0.2, 0])


def hours(count: int) -> np.ndarray:
    """Made-up observations, hours × channels: a daily rhythm."""
    hour = np.arange(count)[:, None]
    return LEVEL + SWING * np.cos((hour - 19) / 24 * 2 * np.pi)


def main(server: str = "localhost:8001", model: str = "forecaster") -> None:
    observed = hours(120)
    with Client(server) as client, client.session(model) as session:
        session.send(observed[:96])  # the past at once
        for row in observed[96:]:  # then an observation each hour: a turn costs one step, however long the session
            usual = session.send(row)
        with session.fork() as what_if:
            for row in hours(126)[120:]:
                other = what_if.send(row + MORE)  # six more hours of load above what is usual
        for row in hours(126)[120:]:
            usual = session.send(row)
        print(f"{len(usual.mean)} hours ahead of {', '.join(usual.channels)}")
        low, median, up = (usual.quantiles[q][:, 0] for q in (0.1, 0.5, 0.9))
        print(f"hour  {usual.channels[0]}, as usual   80 %             after six high hours")
        for ahead in (1, 6, 12, 24, 48, 96):
            at = ahead - 1
            print(f"{ahead:4}  {median[at]:14.2f}   {low[at]:5.2f} … {up[at]:5.2f}    {other.quantiles[0.5][at, 0]:.2f}")
        print("turns applied:", session.turn, "and in the fork", what_if.turn)


if __name__ == "__main__":
    main(*sys.argv[1:])
