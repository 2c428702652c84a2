"""A review scored while it is read, and what it would be if it ended otherwise. Start a server first: make serve.

python docs/examples/review.py [HOST:PORT [MODEL]]
"""

import sys

from seqserve import Client

PIECES = ("I went in expecting very little; ", "the first hour is du", "ll, but the last is superb, ", "and I loved every minute of it.")
OTHERWISE = "and still I walked out: a complete waste of an evening."


def main(server: str = "localhost:8001", model: str = "sentiment") -> None:
    with Client(server) as client, client.session(model) as session:
        for piece in PIECES[:-1]:  # cut anywhere, in a word too
            print(f"{session.send(piece).scores['positive']:6.1%}  {piece}")
        with session.fork() as other:  # starts from the session's state; neither changes the other
            print(f"{other.send(OTHERWISE).scores['positive']:6.1%}  … {OTHERWISE}")
        last = session.send(PIECES[-1])
        print(f"{last.scores['positive']:6.1%}  … {PIECES[-1]}")
        whole = client.classify("".join(PIECES), model)
        print("read whole, the same score:", whole.scores == last.scores)


if __name__ == "__main__":
    main(*sys.argv[1:])
