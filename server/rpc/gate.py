"""Who may call: lets callers in by their key or certificate, holds them to their tenant's quota, and keeps tenants' sessions apart.

Where no keys are configured there is no gate, and a call pays nothing for it. A session of a tenant has, on the shelf and in
the store, the tenant's name before its own; callers see it without. So what a caller names is always its tenant's, an id may
be the same in two tenants, and nothing that another tenant has can be named at all.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import Denied, InvalidInput, ServeError
from server.keys import TENANT, Keys
from server.quotas import SEPARATOR, Caller
from server.records import Unreadable, decode
from server.rpc.answer import Answer, Desk
from server.rpc.front import Call
from server.sessions import Kept
from server.shelf import ID_LENGTH, Shelf


class Gate:
    """Lets calls in."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def admit(self, desk: Desk, call: Call, operator: bool, stream: bool) -> Answer:
        """The answer to a call that may go on. Raises Unauthenticated, Denied, Overloaded."""
        keys = self._keys
        caller = keys.who(call.metadata, call.peer_certificate if keys.certified else None)
        if operator and not caller.operator:
            raise Denied("OPERATORS_ONLY", f"{call.method} is for operators; you call as a user", tenant=caller.tenant.name)
        caller.tenant.spend()
        return _Known(desk, call, call.method, caller, caller.tenant.enter(stream))


class _Known(Answer):
    """The answer to somebody who showed a key."""

    __slots__ = ("_leave", "caller")

    def __init__(self, desk: Desk, call: Call, method: str, caller: Caller, leave: Callable[[], None] | None) -> None:
        super().__init__(desk, call, method)
        self.caller = caller
        self._leave = None if leave is None else [leave]

    def fail(self, error: Exception) -> None:
        super().fail(told(self.caller, error) if isinstance(error, ServeError) else error)

    def _end(self, code: str) -> None:
        if self._leave is not None:
            try:
                leave = self._leave.pop()  # one of two threads gets it: a reply and the caller's leaving may meet
            except IndexError:
                return
            leave()
        super()._end(code)


def stored(caller: Caller | None, id: str) -> str:
    """A session's id on the shelf."""
    return id if caller is None else caller.tenant.prefix + id


def named(caller: Caller | None, id: str) -> str:
    """The same for a session to be made; without an id it gets one. Raises InvalidInput."""
    if caller is None:
        return id
    most = ID_LENGTH - len(caller.tenant.prefix)
    if len(id) > most or not id.isprintable():
        message = f"a session's id has at most {most} printable characters with tenant {caller.tenant.name!r}"
        raise InvalidInput("BAD_ID", message, expected=most, got=len(id))
    return caller.tenant.prefix + (id or secrets.token_urlsafe(12))


def plain(caller: Caller | None, id: str) -> str:
    """What the caller calls it."""
    return id if caller is None else id.removeprefix(caller.tenant.prefix)


def told(caller: Caller | None, error: ServeError) -> ServeError:
    """An error as this caller may read it: its sessions under their own names."""
    if caller is None:
        return error
    prefix = caller.tenant.prefix
    facts = {key: value.removeprefix(prefix) if key == "session" else value for key, value in error.facts.items()}
    message = error.message.replace(f"'{prefix}", "'").replace(f'"{prefix}', '"')  # ids are quoted, as Python does
    return type(error)(error.reason, message, retry_after=error.retry_after, **facts)


@contextmanager
def room(caller: Caller | None, shelf: Shelf) -> Iterator[None]:
    """One session more of the caller's tenant, unless the block fails. Raises Overloaded."""
    if caller is None:
        yield
        return
    tenant = caller.tenant
    tenant.open(lambda: len(_ids(shelf, tenant.prefix)))
    try:
        yield
    except BaseException:
        tenant.closed()
        raise


def left(caller: Caller | None) -> None:
    """A session of the caller's tenant has ended."""
    if caller is not None:
        caller.tenant.closed()


def page(caller: Caller | None, shelf: Shelf, after: str, limit: int) -> tuple[list[Kept], int]:
    """As Shelf.page, of the caller's sessions."""
    if caller is None:
        return shelf.page(after, limit)
    prefix = caller.tenant.prefix
    mine = _ids(shelf, prefix)
    found = []
    for id in [id for id in mine if id > prefix + after][:limit]:
        try:
            found.append(shelf.get(id))
        except ServeError:  # it ended meanwhile, or can't be taken up
            continue
    return found, len(mine)


def brought(caller: Caller | None, record: bytes, pages: Callable[[int], bytes | None], said: str, id: str) -> str:
    """Under which id on the shelf an exported session is to live; `said` is the id beside its record, which has no checksum. Raises
    Denied where it is another tenant's, InvalidInput where that id is not the record's."""
    try:
        owner, separator, own = (was := decode(record, pages).record.kept.id).partition(SEPARATOR)
    except Unreadable:
        return named(caller, id)  # the shelf says why
    if said not in (was, own if separator else was):
        message = f"what was sent is no exported session: its id {said[:ID_LENGTH]!r} is damaged, it is not the record's"
        raise InvalidInput("RECORD_DAMAGED", message)
    if caller is None:
        return id
    if separator and TENANT.fullmatch(owner):
        if owner != caller.tenant.name:
            raise Denied("OTHER_TENANT", "this session was exported by another tenant", tenant=caller.tenant.name)
        was = own
    return named(caller, id or was)


def _ids(shelf: Shelf, prefix: str) -> list[str]:
    """A tenant's sessions, in order."""
    with shelf.changed:
        ids = shelf.sessions.ids()
    return [id for id in ids if id.startswith(prefix)]
