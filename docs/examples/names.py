"""Who and what is spoken of: names in posts, gathered from many at once. Start a server first: make serve.

python docs/examples/names.py [HOST:PORT [MODEL]] < posts.txt      one post a line; without any, those below
"""

import sys
from collections import Counter

from seqserve import Client

POSTS = [
    "Empire State Building = ESB. Pretty bad storm here last evening.",
    "Just met Alicia Keys at the airport in London!",
    "The new iPhone is out, says Apple; Sarah Connor wants one.",
]


def main(server: str = "localhost:8001", model: str = "tagger") -> None:
    posts = POSTS if sys.stdin.isatty() else [line.strip() for line in sys.stdin if line.strip()] or POSTS
    found: Counter[tuple[str, str]] = Counter()
    with Client(server) as client:
        for at in range(0, len(posts), 256):  # so many go into one call; they share rounds
            for tagging in client.tag(posts[at : at + 256], model):
                for span in tagging.spans:
                    assert tagging.text[span.start : span.end] == span.text  # offsets are of the text as it was sent
                    found[span.label, span.text] += 1
        print(f"{len(posts)} posts, {len(found)} names")
        for (label, text), times in found.most_common():
            print(f"{label:14} {times:3}  {text}")
        (tagging,) = client.tag([posts[0].split()], model)  # words that were split elsewhere
        print("of split words:", [(span.label, span.first_word, span.end_word) for span in tagging.spans])


if __name__ == "__main__":
    main(*sys.argv[1:])
