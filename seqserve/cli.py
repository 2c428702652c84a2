"""The command `seqserve`: options, rooms, exit codes. What a command does is in `commands`.

This file must not import the other rooms: `serve`, `train` and `export` are found through the entry points of the
group `seqserve.commands`, each a function from the arguments to the exit code. So the client is of use without them.

Exit codes: 0, 1 where the server is the trouble, 2 where the input is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from seqserve import access, commands, demo, errors, inputs
from seqserve.client import TIMEOUT, Client

GROUP = "seqserve.commands"
SERVER = "localhost:8001"

ROOMS: Mapping[str, tuple[str, str]] = {
    "serve": ("start a server", "cpu"),
    "web": ("open a running server to HTTP and browsers", "web"),
    "train": ("train a model from data", "train"),
    "compare": ("train one task with each kind of recurrent cell; a table and a picture", "train"),
    "export": ("turn a trained model into a bundle that can be served", "train"),
    "inspect": ("say how any ONNX file would be served, state pairs and axes", "cpu"),
    "adapt": ("make a plain ONNX file streamable: its LSTM, GRU and RNN nodes carry state", "train"),
    "convert": ("write a bundle in another precision: float16, int8, its weights alone or all", "train"),
}
"""Commands of other rooms: what each does, and the extra that brings it."""

Command = Callable[[Client, argparse.Namespace], None]


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. Leaves argparse's own SystemExit (0 after help, 2) to the caller."""
    argv = sys.argv[1:] if argv is None else argv
    rooms = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    if argv and argv[0] in {*ROOMS, *rooms}:
        return _room(argv[0], rooms.get(argv[0]), argv[1:])
    parser = _parser(rooms)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(argv)
    server = getattr(options, "server", None) or os.environ.get("SEQSERVE_SERVER") or SERVER
    timeout = getattr(options, "timeout", TIMEOUT)
    try:
        try:
            shown = access.chosen(options)
        except (OSError, ValueError) as e:
            raise inputs.Usage(str(e)) from None
        if options.command == "demo":
            return demo.run(getattr(options, "server", None), Path(options.models) if options.models else None, shown)
        if "run" not in options:
            raise inputs.Usage(f"it takes its own options only: seqserve {options.command} --help")
        with Client(server, timeout=timeout, **shown) as client:
            options.run(client, options)
            sys.stdout.flush()
    except inputs.Usage as e:
        return _say(options.command, str(e), 2)
    except errors.Error as e:
        return _say(options.command, *explain(e, server, timeout))
    except OSError as e:
        return _refused(options.command, e)
    except KeyboardInterrupt:
        return 130
    return 0


def explain(error: errors.Error, server: str, timeout: float) -> tuple[str, int]:
    """One line for a failed call, with what to do, and the exit code."""
    match error:
        case errors.Unavailable():
            todo = "start one with `seqserve serve`, or name another with --server HOST:PORT"
            return f"no server is ready at {server} ({error}): {todo}", 1
        case errors.DeadlineExceeded():
            return f"no answer from {server} within {timeout:g} s: allow more with --timeout SECONDS", 1
        case errors.Overloaded():
            return f"the server is full ({error}): try again in {error.retry_after:g} s", 1
        case errors.NotFound(status="UNIMPLEMENTED"):
            return f"the server at {server} does not have this call ({error}): is it a seqserve of this release?", 1
        case errors.InvalidInput() | errors.NotFound() | errors.FailedPrecondition() | errors.Denied():
            return str(error), 2
        case errors.Cancelled():
            return f"the call was cancelled: {error}", 1
        case _:
            return f"the server failed: {error}; its log says more", 1


def _say(command: str, message: str, code: int) -> int:
    print(f"seqserve {command}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _refused(command: str, error: OSError) -> int:
    """What the system refuses, a file or directory as a rule, in one line; nothing where it is the reader that has gone."""
    if isinstance(error, BrokenPipeError):
        # As with `| head`; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    where = f"{error.filename}: " if error.filename is not None else ""
    return _say(command, f"{where}{error.strerror or error}", 2)


def _room(name: str, entry: metadata.EntryPoint | None, argv: list[str]) -> int:
    extra = ROOMS[name][1] if name in ROOMS else ""
    install = f"pip install 'seqserve[{extra}]'" if extra else "install the package it comes from again"
    if entry is None:
        return _say(name, f"this command is not installed: {install}", 2)
    try:
        run: Callable[[list[str]], int] = entry.load()
        code = run(argv)
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as e:  # a room may also import what is heavy late
        return _say(name, f"the module {e.name!r} is not installed: {install}", 2)
    except OSError as e:
        return _refused(name, e)


# Options


def _parser(rooms: Mapping[str, metadata.EntryPoint]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    where = common.add_argument_group("server")
    where.add_argument("--server", metavar="HOST:PORT", help=f"default: $SEQSERVE_SERVER, else {SERVER}")
    access.add_options(where)
    where.add_argument("--timeout", metavar="SECONDS", type=_seconds, help=f"for each call, default {TIMEOUT:g}")

    parser = argparse.ArgumentParser(
        prog="seqserve",
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serve, train and use sequence models.",
        epilog="examples:\n"
        "  seqserve serve                                     start a server\n"
        "  seqserve classify 'A film to remember.'            ask it\n"
        "  seqserve translate --stream 'A dog runs.'          see the tokens come\n"
        "  seqserve session sentiment                         type a text, see its score change\n"
        "  seqserve demo                                      see everything once\n\n"
        "`seqserve COMMAND --help` has the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"seqserve {_version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for name in dict.fromkeys([*ROOMS, *rooms]):
        missing = "" if name in rooms else f" (not installed: pip install 'seqserve[{ROOMS[name][1]}]')"
        subparsers.add_parser(name, help=(ROOMS[name][0] if name in ROOMS else f"see seqserve {name} --help") + missing)

    def add(name: str, run: Command | None, summary: str, description: str, *examples: str) -> argparse.ArgumentParser:
        made = subparsers.add_parser(
            name,
            parents=[common],
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        )
        if run is not None:
            made.set_defaults(run=run)
        return made

    c = add(
        "classify", commands.classify, "label texts", "Labels each TEXT, or each line of standard input where there is none.",
        "seqserve classify 'A film to remember.' 'Two hours I will not get back.'",
        "seqserve classify --json < reviews.txt > labels.jsonl",
    )  # fmt: skip
    c.add_argument("text", metavar="TEXT", nargs="*")
    _model_options(c)

    c = add(
        "tag", commands.tag, "find names in texts",
        "Marks the spans that a tagger finds in each TEXT, or each line of standard input where there is none.",
        "seqserve tag 'Empire State Building, said Alicia Keys.'",
        "seqserve tag --json < posts.txt > spans.jsonl",
    )  # fmt: skip
    c.add_argument("text", metavar="TEXT", nargs="*")
    c.add_argument("--words", action="store_true", help="the texts are split into words already, with spaces")
    c.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: where a terminal reads; heeds $NO_COLOR")
    _model_options(c)

    c = add(
        "translate", commands.translate, "translate texts", "Translates each TEXT, or each line of standard input where there is none.",
        "seqserve translate 'A dog runs along the beach.' --beam 5",
        "seqserve translate --stream 'Two men play chess in the park.'",
        "seqserve translate --attention 'A child climbs a tree.'",
    )  # fmt: skip
    c.add_argument("text", metavar="TEXT", nargs="*")
    c.add_argument("--source", metavar="LANGUAGE", default="", help="such as en; default: what the model translates")
    c.add_argument("--target", metavar="LANGUAGE", default="", help="such as de")
    c.add_argument("--beam", metavar="N", type=int, default=0, help="hypotheses kept, 1 to 10; default: the model's own")
    c.add_argument("--max-tokens", metavar="N", type=int, default=0, help="stop after so many; default: the model's own limit")
    c.add_argument("--stream", action="store_true", help="print tokens as they are decoded")
    c.add_argument("--attention", action="store_true", help="show where the model looked for each token")
    c.add_argument("--attention-png", metavar="FILE", type=Path, help="the same as a picture, of the last text (needs matplotlib)")
    _model_options(c)

    c = add(
        "generate", commands.generate, "go on with a text",
        "Goes on with TEXT (without it, with standard input), symbol by symbol as they are drawn. The seed is told at the end:\n"
        "with it the same text comes again.",
        "seqserve generate 'KING RICHARD:' --temperature 0.8",
        "seqserve generate '' --max-symbols 1000 --seed 7",
        "seqserve generate 'ROMEO:' --stop '\\n\\n' --json",
    )  # fmt: skip
    c.add_argument("text", metavar="TEXT", nargs="?")
    c.add_argument("--temperature", metavar="T", type=float, default=1.0, help="0 takes the likeliest symbol, above 1 is wilder; default 1")
    c.add_argument("--top-k", metavar="N", type=int, default=0, help="draw from so many of the likeliest; default: from all")
    c.add_argument("--seed", metavar="N", type=int, help="default: the server draws one")
    c.add_argument("--max-symbols", metavar="N", type=int, default=0, help="default: 200")
    c.add_argument("--stop", metavar="TEXT", action="append", help="end after this text, \\n standing for a new line; may be given again")
    _model_options(c)

    c = add(
        "forecast", commands.forecast, "continue a series",
        "Continues the series in a CSV file (- for standard input): a heading, then one row per step, oldest first.\n"
        "Columns that are not numbers, such as dates, are left out; the model's look-back decides how many rows are read.",
        "seqserve forecast measurements.csv --horizon 24",
        "tail -n 200 log.csv | seqserve forecast - --columns load,temperature --quantiles 0.05,0.95 --json",
    )  # fmt: skip
    c.add_argument("csv", metavar="CSV")
    c.add_argument("--horizon", metavar="STEPS", type=int, default=0, help="steps ahead; default: as many as the model gives")
    c.add_argument("--quantiles", metavar="Q,Q", type=_numbers, default=[], help="such as 0.1,0.9; default: all the model has")
    c.add_argument("--columns", metavar="NAME,NAME", type=lambda s: s.split(","), help="the model's channels, in its order")
    _model_options(c)

    c = add(
        "session", commands.session, "talk to a model that remembers",
        "Opens a session of MODEL: each line of standard input is a turn, and its answer is of all turns so far.\n"
        "A classifier takes a piece of text a line, a forecaster an observation (a row of CSV; the heading may be left out\n"
        "where there is a number for each channel), any other model a JSON object of tensors by name. The session is\n"
        "closed in the end, unless it is kept.",
        "seqserve session sentiment",
        "fold -s -w 40 review.txt | seqserve session sentiment --json",
        "tail -f log.csv | seqserve session forecaster --id boiler --keep",
        "seqserve session --resume boiler --keep < more.csv",
        "seqserve session --resume boiler < /dev/null        close it",
    )  # fmt: skip
    c.add_argument("model", metavar="MODEL", nargs="?", default="", help="see seqserve models; not needed with --resume")
    c.add_argument("--model-version", metavar="VERSION", default="", help="default: the newest")
    c.add_argument("--id", metavar="ID", default="", help="a name of your own; default: a new one")
    c.add_argument("--resume", metavar="ID", default="", help="go on with a session that was kept, after its last turn")
    c.add_argument("--keep", action="store_true", help="do not close it in the end")
    c.add_argument(
        "--ttl", metavar="SECONDS", type=_seconds, default=0.0, help="it lives so long after its last turn; default: the server's"
    )
    c.add_argument("--columns", metavar="NAME,NAME", type=lambda s: s.split(","), help="a forecaster's channels, in its order")
    c.add_argument("--json", action="store_true", help="print JSON, one object a turn")

    c = add("sessions", commands.sessions, "list open sessions", "Lists the sessions that are open, by id.", "seqserve sessions --json")
    c.add_argument("--json", action="store_true", help="print JSON, one object a line")

    c = add(
        "models",
        commands.models,
        "list what a server serves",
        "Lists what the server serves.",
        "seqserve models --server gpu1:8001",
    )
    c.add_argument("--json", action="store_true", help="print JSON")

    c = add(
        "health", commands.health, "ask whether a server serves",
        "Asks the server's health (grpc.health.v1): prints its word, and exits with 1 unless that is SERVING. For container\n"
        "health checks and scripts that wait.",
        "seqserve health --timeout 2",
        "seqserve health --service seqserve.v1.Sessions",
    )  # fmt: skip
    c.add_argument("--service", metavar="NAME", default="", help="of one service; default: of the server")

    c = add(
        "infer", commands.infer, "run a model on plain tensors",
        "Runs a model on tensors: NAME=JSON, NAME=@FILE.json or NAME=@FILE.npy for each input.\n"
        "JSON takes the datatype that the model names; without any input, the tensors it wants are listed.",
        "seqserve infer sentiment",
        "seqserve infer sentiment 'tokens=[[5, 17, 9]]'",
        "seqserve infer forecaster values=@series.npy --out answers/",
    )  # fmt: skip
    c.add_argument("model", metavar="MODEL")
    c.add_argument("input", metavar="NAME=VALUE", nargs="*")
    c.add_argument("--output", metavar="NAME", action="append", default=[], help="only this output (may be repeated)")
    c.add_argument("--model-version", metavar="VERSION", default="", help="default: the newest")
    c.add_argument("--out", metavar="DIR", type=Path, help="write each output to DIR/NAME.npy")
    c.add_argument("--json", action="store_true", help="print JSON")

    c = add(
        "demo", None, "see everything once",
        "Starts a server with the bundles at hand, asks it for one of everything, and stops it; with --server, asks that one.",
        "seqserve demo", "seqserve demo --models runs/bundles",
    )  # fmt: skip
    c.add_argument("--models", metavar="DIR", help="bundles to serve, default ./models")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", default="", help="default: the server's only model for this task")
    parser.add_argument("--model-version", metavar="VERSION", default="", help="default: the newest")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.1,0.9") from None


def _version() -> str:
    try:
        return metadata.version("seqserve")
    except metadata.PackageNotFoundError:
        return "(not installed)"
