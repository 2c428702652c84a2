"""How much text a task takes at once: it is made into tokens before anything else can be answered."""

from __future__ import annotations

from server.errors import InvalidInput

LETTERS = 100_000  # of one text; some 30 ms of a vocabulary's time


def check_letters(text: str) -> None:
    """Raise InvalidInput where a text is longer than is read at once."""
    if len(text) > LETTERS:
        message = f"the text has {len(text)} letters; at most {LETTERS} are allowed"
        raise InvalidInput("TOO_LONG", message, expected=f"1..{LETTERS}", got=len(text))
