"""Every reason that the server can refuse with, and the statuses it comes with, read off its code.

A reason is the first argument of an error's making. Where that is no constant, it is either an argument of the function around it, and
then its callers have it, or one of MADE_UP, which says by the code's own tables what it can be. Anything else is an error here: a
reason that nobody can list is one that nobody can be told how to act on.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from server import records, sessions, store
from server.errors import ServeError

RECORDS = [f"RECORD_{fault}" for fault in (records.FOREIGN, records.OTHER_FORMAT, records.SHORT, records.DAMAGED)]
MADE_UP: Mapping[str, Iterable[str]] = {
    "f'SESSION_{why.upper()}'": [f"SESSION_{why.upper()}" for why in sessions._HOW],
    "'RECORD_' + e.reason": RECORDS,
    "'RECORD_' + found.reason": RECORDS,
    "f'TENANT_{what}'": ["TENANT_SESSIONS", "TENANT_CALLS", "TENANT_STREAMS", "TENANT_RATE"],
    "e.reason": [],  # told again, in other words
}
assert issubclass(store.StoreFailed, ServeError)  # its file is imported, so that it is among the kinds


def kinds() -> dict[str, str]:
    """Every kind of error by name, with its status."""

    def below(kind: type[ServeError]) -> Iterator[type[ServeError]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    return {kind.__name__: kind.status for kind in below(ServeError)}


def reasons(files: Iterable[Path]) -> dict[str, set[str]]:
    """Reason → its statuses. Raises ValueError naming the place of a reason that can't be told."""
    known = kinds()
    found: dict[str, set[str]] = defaultdict(set)
    # File and function → where its reason is, and its status or where its kind is. Another file may have one of the same name.
    forwards: dict[tuple[Path, str], tuple[int, str | int]] = {}
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    for file, tree in trees.items():
        for function, call in _calls(tree):
            name, given = _name(call.func), call.args
            arguments = [a.arg for a in function.args.args if a.arg != "self"] if function else []
            if name in known:
                status: str | int = known[name]
            elif name in arguments and function is not None and _is_kind(function, name):
                status = arguments.index(name)
            else:
                continue
            if not given:
                raise ValueError(f"{file}:{call.lineno}: {name} without a reason")
            first = given[0]
            if isinstance(first, ast.Name) and function is not None and first.id in arguments:
                if not function.name.startswith("_"):
                    raise ValueError(f"{file}:{call.lineno}: {function.name} passes reasons on from who knows where: make it private")
                forwards[file, function.name] = (arguments.index(first.id), status)
            elif isinstance(status, str):
                for reason in _spelled(first, f"{file}:{call.lineno}"):
                    found[reason].add(status)
            else:
                raise ValueError(f"{file}:{call.lineno}: {ast.unparse(call)} hides its kind")
    for file, tree in trees.items():
        for _, call in _calls(tree):
            if (forward := forwards.get((file, _name(call.func)))) is None:
                continue
            at, status = forward
            kind = status if isinstance(status, str) else known[_name(call.args[status])]
            for reason in _spelled(call.args[at], f"{file}:{call.lineno}"):
                found[reason].add(kind)
    return dict(found)


def _spelled(first: ast.expr, where: str) -> Iterable[str]:
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        return [first.value]
    if (spelled := MADE_UP.get(ast.unparse(first))) is None:
        message = f"{where}: {ast.unparse(first)} is no reason that can be listed: make it a constant, or say in MADE_UP what it can be"
        raise ValueError(message)
    return spelled


def _calls(tree: ast.AST, within: ast.FunctionDef | None = None) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """Every call with the function that it is in."""
    for node in ast.iter_child_nodes(tree):
        inner = node if isinstance(node, ast.FunctionDef) else within
        if isinstance(node, ast.Call):
            yield within, node
        yield from _calls(node, inner)


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""


def _is_kind(function: ast.FunctionDef, name: str) -> bool:
    """Whether an argument is a kind of error: annotated type[ServeError]."""
    return any(a.arg == name and a.annotation is not None and ast.unparse(a.annotation) == "type[ServeError]" for a in function.args.args)
