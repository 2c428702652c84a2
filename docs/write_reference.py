"""`python -m docs.write_reference` (`make reference`) writes docs/reference/ from what it describes: the .proto files with their
comments, the knobs of server/config.py, the options of every command. `--check` compares.

The pages are committed, like docs/metrics.md and docs/models.md: they are read where the code is read, without building a site, and a
change of the wire or of a knob shows in its diff as what users will see. A test fails while they are stale.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from unittest import mock

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto

from protos.__main__ import SOURCES
from seqserve import cli
from server.config import Config

ROOT = Path(__file__).resolve().parent.parent
PAGES = Path("docs/reference")
MADE = "<!-- written by make reference -->"

TITLES = {
    "seqserve": ("tasks", "Tasks: seqserve.v1.Tasks"),
    "sessions": ("sessions", "Sessions: seqserve.v1.Sessions"),
    "inside": ("inside", "Inside: seqserve.v1.Inside"),
    "inference": ("inference", "Open Inference Protocol: inference.GRPCInferenceService"),
    "model_config": ("model_config", "Model configuration, as Triton's clients read it"),
}
"""Page and title by .proto file."""

_Kind = FieldDescriptorProto.Type
_Many = FieldDescriptorProto.LABEL_REPEATED


class _Proto:
    """One .proto file with its comments, as Markdown."""

    def __init__(self, file: FileDescriptorProto, homes: dict[str, str]) -> None:
        self._file = file
        self._homes = homes  # message or enum → the page that has it
        self._said = {tuple(at.path): at for at in file.source_code_info.location}

    def text(self, title: str, source: str) -> str:
        head = self._said[(12,)]  # `syntax`, which the comment that opens the file stands before
        about = "\n\n".join(_prose(part) for part in [*head.leading_detached_comments, head.leading_comments] if part.strip())
        parts = [f"# {title}", MADE, about, f"From [{source}](../../{source}). Fields that are left out have their type's empty value."]
        for at, service in enumerate(self._file.service):
            lines = ["| method | request → reply | |", "|---|---|---|"]
            for n, m in enumerate(service.method):
                flow = [("stream " if streams else "") + self._named(type) for streams, type in
                        ((m.client_streaming, m.input_type), (m.server_streaming, m.output_type))]  # fmt: skip
                lines.append(f"| `{m.name}` | {' → '.join(flow)} | {self._cell(6, at, 2, n)} |")
            parts += [f"## {service.name}", self._about(6, at), "\n".join(lines)]
        parts.append("## Messages" if self._file.message_type else "")
        for at, message in enumerate(self._file.message_type):
            parts += self._message(message, (4, at), "")
        for at, enum in enumerate(self._file.enum_type):
            parts += self._enum(enum, (5, at), "")
        return "\n\n".join(part for part in parts if part) + "\n"

    def _message(self, message: DescriptorProto, path: tuple[int, ...], outer: str) -> Iterator[str]:
        if message.options.map_entry:
            return
        name = outer + message.name
        yield f"### {name}"
        yield self._about(*path)
        if message.field:
            lines = ["| field | type | no. | |", "|---|---|---|---|"]
            for n, f in enumerate(message.field):
                one = message.oneof_decl[f.oneof_index].name if f.HasField("oneof_index") and not f.proto3_optional else ""
                said = " ".join(s for s in (f"One of `{one}`." if one else "", self._cell(*path, 2, n)) if s)
                lines.append(f"| `{f.name}` | {self._type(f, message)} | {f.number} | {said} |")
            yield "\n".join(lines)
        else:
            yield "No fields."
        for n, inner in enumerate(message.nested_type):
            yield from self._message(inner, (*path, 3, n), name + ".")
        for n, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, 4, n), name + ".")

    def _enum(self, enum: EnumDescriptorProto, path: tuple[int, ...], outer: str) -> Iterator[str]:
        yield f"### {outer}{enum.name}"
        yield self._about(*path)
        yield "An enum: " + ", ".join(f"`{v.name}` {v.number}" for v in enum.value) + "."

    def _type(self, f: FieldDescriptorProto, within: DescriptorProto) -> str:
        if f.type_name:
            entry = next((n for n in within.nested_type if n.options.map_entry and f.type_name.endswith("." + n.name)), None)
            if entry is not None:
                return f"map of {self._type(entry.field[0], entry)} to {self._type(entry.field[1], entry)}"
        plain = self._named(f.type_name) if f.type_name else _Kind.Name(f.type).removeprefix("TYPE_").lower()
        return ("repeated " if f.label == _Many else "optional " if f.proto3_optional else "") + plain

    def _named(self, full: str) -> str:
        """A link to where a message is told of."""
        name = full.removeprefix(".").removeprefix(self._file.package + ".")
        page = self._homes[full]
        here = TITLES[Path(self._file.name).stem][0]
        return f"[{name}]({'' if page == here else page + '.md'}#{name.lower().replace('.', '')})"

    def _about(self, *path: int) -> str:
        at = self._said.get(path)
        return _prose(at.leading_comments) if at else ""

    def _cell(self, *path: int) -> str:
        return self._about(*path).replace("\n", " ").replace("|", "\\|")


def _prose(comment: str) -> str:
    return "\n".join(line.strip() for line in comment.strip().splitlines())


def protos() -> dict[str, str]:
    """The pages of the .proto files. Needs grpcio-tools (the dev extra)."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        if protoc.main(["protoc", f"-I{ROOT}", "--include_source_info", f"--descriptor_set_out={out}", *SOURCES]):
            raise SystemExit("protoc failed: its message is above")
        files = [f for f in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file if f.name in SOURCES]
    homes: dict[str, str] = {}
    for f in files:
        page = TITLES[Path(f.name).stem][0]
        for name in _names(f.message_type, f.enum_type):
            homes[f".{f.package}.{name}"] = page
    pages = {}
    for f in files:
        page, title = TITLES[Path(f.name).stem]
        pages[page] = _Proto(f, homes).text(title, f.name)
    return pages


def _names(messages: Sequence[DescriptorProto], enums: Sequence[EnumDescriptorProto], outer: str = "") -> Iterator[str]:
    for enum in enums:
        yield outer + enum.name
    for m in messages:
        yield outer + m.name
        yield from _names(m.nested_type, m.enum_type, f"{outer}{m.name}.")


CONFIGURATION = """\
Every knob is a flag of `seqserve serve` and a variable; the flag wins. What does not fit is told at the start, all faults at once.
A switch has a `--no-` twin (`--no-reflection`); as a variable it is `1`, `true`, `yes`, or anything else for off.

```sh
SEQSERVE_MAX_ROWS=128 seqserve serve --models models --port 8001 --store lmdb:.sessions
```"""


def configuration() -> str:
    """The page of the knobs."""
    lines = ["| flag, variable | default | what for |", "|---|---|---|"]
    for f in fields(Config):
        default = "auto" if f.type == "Count" else f.default  # 0 stands for that word
        shown = "one per core" if f.name == "workers" else "off" if default is False else "on" if default is True else str(default)
        shown = "–" if default is None or shown == "" else f"`{shown}`" if shown not in ("one per core", "on", "off") else shown
        flag = f"--{f.name.replace('_', '-')}"
        lines.append(f"| `{flag}`<br>`SEQSERVE_{f.name.upper()}` | {shown} | {_escaped(f.metadata['help'])} |")
    return "\n\n".join(["# Configuration", MADE, CONFIGURATION, "\n".join(lines)]) + "\n"


class _Seen(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _parser_of(main: Callable[[list[str]], object]) -> argparse.ArgumentParser:
    """The parser that a command would read its arguments with."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Seen(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), mock.patch.dict(os.environ, clear=True):
        try:
            main([])
        except _Seen as seen:
            return seen.parser
    raise ValueError(f"{main} reads no arguments")


CLI = """\
One command, `seqserve`, for servers, clients, training and export. Clients find the server by `--server HOST:PORT` or `SEQSERVE_SERVER`
(default: {server}). Exit codes: 0; 1 where the server is the trouble; 2 where the input is."""


def commands() -> str:
    """The page of the commands: the client's own, those that other rooms bring, and keys."""
    client = cli._parser({})
    subparsers = next(a for a in client._actions if isinstance(a, argparse._SubParsersAction))
    helps = {a.dest: a.help or "" for a in subparsers._choices_actions}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = ["# Commands", MADE, CLI.format(server=cli.SERVER), "## Options of every client", _options(client, skip={"version"})]
    common = {a.dest for a in client._actions}
    for name, parser in subparsers.choices.items():
        if name not in cli.ROOMS:
            parts += _command(f"seqserve {name}", helps[name], parser, common)
    for name, at in project["entry-points"]["seqserve.commands"].items():
        module, _, function = at.partition(":")
        told = cli.ROOMS.get(name, ("", ""))[0]
        if name == "serve":
            parts += ["## seqserve serve", _sentence(told), "Its knobs: [configuration](configuration.md)."]
        else:
            parts += _command(f"seqserve {name}", told, _parser_of(getattr(import_module(module), function)), set())
    keys = _parser_of(getattr(import_module("server.keys"), "main"))  # noqa: B009 (mypy knows no entry points either)
    parts += _command("python -m server.keys", "", keys, set())
    return "\n\n".join(part for part in parts if part) + "\n"


def _command(title: str, told: str, parser: argparse.ArgumentParser, common: set[str]) -> list[str]:
    about = parser.description or ""
    about = _escaped(" ".join(about.split())) if about and about.rstrip(".").lower() != told.rstrip(".").lower() else _sentence(told)
    examples = (parser.epilog or "").strip("\n")
    return [f"## {title}", about, _options(parser, skip=common), f"```text\n{examples}\n```" if examples else ""]


def _options(parser: argparse.ArgumentParser, skip: set[str]) -> str:
    lines = []
    for a in parser._actions:
        if a.dest in skip or isinstance(a, argparse._HelpAction | argparse._SubParsersAction):
            continue
        taken = a.metavar if isinstance(a.metavar, str) else "{" + ",".join(map(str, a.choices)) + "}" if a.choices else a.dest.upper()
        value = "" if a.nargs == 0 or isinstance(a, argparse.BooleanOptionalAction) else taken
        named = ", ".join(f"{o} {value}".strip() for o in a.option_strings) or taken
        said = a.help or ""
        lines.append(f"| `{named}` | {_escaped(said % {'default': a.default} if '%(' in said else said)} |")
    return "\n".join(["| option | |", "|---|---|", *lines]) if lines else ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


def _escaped(text: str) -> str:
    """For Markdown, in a table: bars and what would be a tag or emphasis."""
    return re.sub(r"([|<>*_$])", r"\\\1", text.replace("\\", "\\\\"))


def pages() -> dict[Path, str]:
    """Every page by its file."""
    return {PAGES / f"{name}.md": text for name, text in {**protos(), "configuration": configuration(), "cli": commands()}.items()}


def stale() -> list[str]:
    """The pages that are not what would be written."""
    return [str(p) for p, text in pages().items() if not (ROOT / p).exists() or (ROOT / p).read_text(encoding="utf-8") != text]


def main(arguments: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(prog="python -m docs.write_reference", description="Write docs/reference from the code.")
    words.add_argument("--check", action="store_true", help="write nothing; fail where a page is not what would be written")
    if words.parse_args(arguments).check:
        if differing := stale():
            print(f"stale: {', '.join(differing)}: run make reference", file=sys.stderr)
        return 1 if differing else 0
    for page, text in pages().items():
        (ROOT / page).parent.mkdir(exist_ok=True)
        (ROOT / page).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
