"""Golden stories: text files of commands and what happened, one story after another, divided by blank lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Story:
    file: Path
    number: int
    title: str
    commands: tuple[str, ...]
    told: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file.stem}-{self.number}"

    @property
    def text(self) -> str:
        return "\n".join([self.title, *self.commands, "---", *self.told]) + "\n"


def read(file: Path) -> list[Story]:
    made = []
    for number, part in enumerate(file.read_text(encoding="utf-8").strip().split("\n\n"), 1):
        before, _, after = part.partition("\n---")
        title, *commands = before.splitlines()
        made.append(Story(file, number, title, tuple(commands), tuple(after.strip().splitlines())))
    return made


def stories(folder: Path) -> list[Story]:
    return [story for file in sorted(folder.glob("*.txt")) for story in read(file)]


def check(story: Any, tell: Callable[[str], str], *, update: bool) -> None:
    """Tell the story; compare what happened with what is written, or write it."""
    told = tuple(line for command in story.commands for line in tell(command).splitlines())
    if update:
        whole = [Story(s.file, s.number, s.title, s.commands, told if s.number == story.number else s.told) for s in read(story.file)]
        story.file.write_text("\n".join(s.text for s in whole), encoding="utf-8")
        return
    assert list(told) == list(story.told), story.title
