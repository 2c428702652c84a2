"""Tiny Shakespeare: 40,000 lines of the plays in one plain file (Karpathy, char-rnn, 2015); text in the public domain.

It knows where the file comes from and how it is split; it must not know models or vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.data import Source, fetch

ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TEST = 1_003_854  # where the test begins: the last tenth
VALIDATION = 480_000, 520_000
"""From the middle. Just before the test lie the first scenes of the play that it begins in, and they alone have the names of
its people: where they were held out, 3 of the test's 920 speeches were by speakers that training had seen (550 with them), and
the test came out at 1.68 nats a character, the validation at 1.52."""


@dataclass(frozen=True, slots=True)
class Text:
    """The file cut up; the test is the last tenth, the split that nanoGPT's figures are given for. `train` is in two parts,
    as the validation lies between them."""

    train: tuple[str, str]
    validation: str
    test: str


def load(data: Path | None) -> Text:
    """Read the text. `data` is a directory with tinyshakespeare/input.txt or input.txt, or None to download. Raises
    DataError."""
    file = fetch(Source("input.txt", ADDRESS, "sha256:" + SHA256), data, "tinyshakespeare")
    text = file.read_bytes().decode("ascii")
    first, last = VALIDATION
    return Text((text[:first], text[last:TEST]), text[first:last], text[TEST:])


def stretches(text: str, longest: int) -> list[str]:
    """The text as documents of at most about `longest` characters, each beginning with a speech.

    The file runs one play into the next without a mark, so a document's end is an empty line chosen by length.
    """
    found: list[str] = []
    while len(text) > longest:
        cut = text.rfind("\n\n", 1, longest)
        cut = longest if cut < 0 else cut + 2
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text] if text else found
