"""Keys and certificates of callers, from a file: whose they are, what they may do. Read again when the file changes.

    [tenants.acme]              what it may have; left out, no limit of its own
    sessions = 1000             open sessions
    calls = 64                  calls at once
    streams = 16                streams at once
    rate = 200                  requests a second
    burst = 400                 requests at once after a pause
    priority = 3                the highest class that its requests run in, from 1

    [[keys]]
    name = "acme's web page"    for logs
    tenant = "acme"
    role = "user"               or "operator", who may also change models, log levels and shared memory
    sha256 = "…"                of the key; the key itself is nowhere

    [[certificates]]            who proves to be this by a certificate of --tls-client-ca needs no key
    name = "acme's batch jobs"
    tenant = "acme"
    role = "user"
    uri = "spiffe://acme/batch" one of: uri, dns, email (alternative names), subject (CN=batch,O=Acme), sha256 (of the certificate)

A key that is shown counts, right or wrong; a certificate counts where none is.

This file knows the file and hashes; it must not know gRPC. No key, right or wrong, is ever logged or told.
`python -m server.keys TENANT [--operator] [--name NAME]` makes a key: the key on standard output, its entry on standard error.

A key is random and long (256 bits), so a plain SHA-256 can't be turned back; it is no place for a password.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import sys
import threading
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from server.certificates import KINDS, Trait, traits
from server.certificates import trait as certified
from server.errors import Unauthenticated, listed
from server.quotas import Caller, Quota, Tenant
from server.shares import LEVELS

log = logging.getLogger(__name__)

HEADERS = ("authorization", "x-api-key")  # the first as "Bearer KEY"
TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
ROLES = ("user", "operator")
KEY = "key"  # beside the kinds of traits that certificates have
LARGEST = 4 << 20  # bytes of the file: some 20,000 keys
Entry = tuple[Trait, str, str, bool]
"""What is shown; name, tenant, and whether it is an operator's."""

_BEARER = "bearer "
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Keys:
    """All keys that are valid now. Raises OSError or ValueError where the file can't be read; any thread may use it."""

    def __init__(self, file: Path, interval: float) -> None:
        """`interval`: seconds between looks at the file, 0 for never; SIGHUP calls `reload` besides."""
        self._file = file
        self._interval = interval
        self._lock = threading.Lock()  # one reading at a time
        self._tenants: dict[str, Tenant] = {}
        # By what they show: ("key", its hash), or a trait of a certificate. Replaced whole, never changed.
        self._callers: dict[Trait, Caller] = {}
        self._known: dict[str | bytes, Caller] = {}  # header, or certificate in DER → caller, of those seen; replaced with it
        self.certified = False  # whether there are certificates
        self._stamp = self._stamped()
        self._take(*_read(file))
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._look, name="keys", daemon=True)

    def start(self) -> None:
        if self._interval:
            self._watch.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._watch.is_alive():
            self._watch.join()

    def who(self, metadata: Iterable[tuple[str, str | bytes]], certificate: bytes | None = None) -> Caller:
        """Whoever sent this metadata, over a connection with this certificate (DER). Raises Unauthenticated."""
        for name, value in metadata:
            if name == "authorization" or name == "x-api-key":
                # A key seen before costs this look-up. It tells nothing by its time: values are compared only where their 64-bit
                # hashes under this process's secret are equal.
                caller = self._known.get(value)
                return caller if caller is not None else self._meet(name, value)
        if certificate is not None and self.certified:
            caller = self._known.get(certificate)
            return caller if caller is not None else self._meet_certified(certificate)
        raise Unauthenticated("NO_KEY", "this server wants a key: send metadata 'authorization: Bearer KEY' or 'x-api-key: KEY'")

    def _meet_certified(self, certificate: bytes) -> Caller:
        """A certificate not seen before."""
        callers, known = self._callers, self._known
        try:
            said = traits(certificate)
        except ValueError as e:
            raise Unauthenticated("BAD_CERTIFICATE", str(e)) from None
        found = {callers[trait] for trait in said if trait in callers}
        if len(found) == 1:
            if len(known) < 8 * len(callers):
                known[certificate] = next(iter(found))
            return found.pop()
        why = "is of several entries of this server's" if found else "is of none of this server's entries"
        names = listed(f"{kind} {value}" for kind, value in said if kind != "sha256")
        raise Unauthenticated("BAD_CERTIFICATE", f"the certificate ({names}) {why}, and there was no key; ask whoever runs the server")

    def _meet(self, header: str, value: str | bytes) -> Caller:
        """A value not seen before: its hash is compared with every key's, in the same time wherever they differ."""
        callers, known = self._callers, self._known
        text = value if isinstance(value, str) else value.decode("latin-1")
        bearer = text[: len(_BEARER)].lower() == _BEARER
        if bearer or header != "authorization":
            digest = hashlib.sha256((text[len(_BEARER) :] if bearer else text).strip().encode()).hexdigest()
            found = None
            for (kind, have), caller in callers.items():
                if kind == KEY and hmac.compare_digest(have, digest):
                    found = caller
            if found is not None:
                if len(known) < 8 * len(callers):  # a key has few spellings
                    known[value] = found
                return found
        raise Unauthenticated("BAD_KEY", "the key is none of this server's, or was revoked; ask whoever runs it for one")

    def reload(self) -> bool:
        """Read the file anew; where it has faults, what was valid stays so and the log says why. Whether it was read."""
        with self._lock:
            self._stamp = self._stamped()
            try:
                self._take(*_read(self._file))
            except (OSError, ValueError) as e:
                log.error("the keys of before stay valid: %s", e)
                return False
        return True

    def _take(self, quotas: Mapping[str, Quota], entries: Sequence[Entry]) -> None:
        for name, quota in quotas.items():
            if name in self._tenants:
                self._tenants[name].change(quota)
            else:
                self._tenants[name] = Tenant(name, quota)
        before = self._callers
        callers: dict[Trait, Caller] = {}
        for shown, name, tenant, operator in entries:
            old = before.get(shown)
            same = old is not None and old.tenant.name == tenant and old.operator == operator
            callers[shown] = old if old is not None and same else Caller(name, self._tenants[tenant], operator)
        # In this order: who looks in between meets a key of before once more, and is not remembered for it.
        self._callers, self._known = callers, {}
        self.certified = any(kind != KEY for kind, _ in callers)
        for shown, caller in before.items():
            caller.revoked = callers.get(shown) is not caller
        gone = [f"{c.tenant.name}/{c.name or '(no name)'}" for c in before.values() if c.revoked]
        tenants = len({c.tenant.name for c in callers.values()})
        keys = sum(kind == KEY for kind, _ in callers)
        others = f" and {len(callers) - keys} certificates" if self.certified else ""
        log.info("%d keys%s of %d tenants%s", keys, others, tenants, f"; revoked or changed: {listed(gone)}" if gone else "")

    def _stamped(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _look(self) -> None:
        while not self._stopping.wait(self._interval):
            if self._stamped() != self._stamp:
                self.reload()


def _read(file: Path) -> tuple[dict[str, Quota], list[Entry]]:
    """Quotas by tenant, and whoever is let in. Raises OSError, or ValueError with
    every fault; neither repeats what is in the file."""
    with file.open("rb") as f:
        if os.fstat(f.fileno()).st_mode & stat.S_IWOTH:
            raise ValueError(f"{file}: everybody may write this file; chmod o-w it")
        data = f.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"{file}: more than {LARGEST} bytes")
    try:
        found = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        # Python's own words might quote the line, and somebody may have pasted a key there.
        place = re.search(r"at line \d+, column \d+", str(e))
        raise ValueError(f"{file} is no TOML{', ' + place[0] if place else ''}") from None
    faults: list[str] = []
    tenants, keys, certificates = found.pop("tenants", {}), found.pop("keys", []), found.pop("certificates", [])
    if found:
        faults.append("there are only [tenants.NAME], [[keys]] and [[certificates]]")
    quotas = {}
    for name, given in tenants.items() if isinstance(tenants, dict) else ():
        if not TENANT.fullmatch(name):
            faults.append(f"tenant {name[:40]!r}: names have up to 32 of a-z 0-9 . _ -")
        quotas[name] = _quota(name, given, faults)
    entries: dict[Trait, Entry] = {}
    for what, given, kinds in (("key", keys, ("sha256",)), ("certificate", certificates, KINDS)):
        for i, one in enumerate(given if isinstance(given, list) else (), 1):
            entry = _entry(f"{what} {i}", one, kinds, quotas, faults)
            if entry is not None and entry[0] in entries:
                faults.append(f"{what} {i} is there twice")
            elif entry is not None:
                entries[entry[0]] = entry
    if not entries and not faults:
        faults.append("there is no [[keys]] entry; make one with python -m server.keys TENANT")
    if faults:
        raise ValueError(f"{file}: {'; '.join(faults)}")
    return quotas, list(entries.values())


def _quota(name: str, given: Any, faults: list[str]) -> Quota:
    kinds = {f.name: float if f.name in ("rate", "burst") else int for f in fields(Quota)}
    values: dict[str, Any] = {}
    for field, value in given.items() if isinstance(given, dict) else ():
        kind = kinds.get(field)
        if kind is None:
            faults.append(f"tenant {name[:40]!r}: there are only {', '.join(kinds)}")
        elif field == "priority" and value not in range(LEVELS + 1):
            faults.append(f"tenant {name[:40]!r}: priority is a class from 1, the highest, to {LEVELS}, or 0 for any")
        elif isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 <= value <= 1e9:
            faults.append(f"tenant {name[:40]!r}: {field} is a number, 0 (no limit) or more")
        else:
            values[field] = value
    return Quota(**values)


def _entry(what: str, given: Any, kinds: Sequence[str], quotas: dict[str, Quota], faults: list[str]) -> Entry | None:
    """One of [[keys]] or [[certificates]]: known by one of `kinds`."""
    known = isinstance(given, dict) and set(given) <= {"name", "tenant", "role", *kinds}
    if not known or not all(isinstance(value, str) for value in given.values()):
        faults.append(f"{what}: it has name, tenant, role and {' or '.join(kinds)}, all texts, and nothing else")
        return None
    tenant, role, shown = given.get("tenant", ""), given.get("role", "user"), [kind for kind in kinds if kind in given]
    if not TENANT.fullmatch(tenant):
        faults.append(f"{what}: tenant is a name of up to 32 of a-z 0-9 . _ -")
    if role not in ROLES:
        faults.append(f"{what}: role is user or operator")
    if kinds == ("sha256",):
        trait = KEY, given.get("sha256", "")
        if not _SHA256.fullmatch(trait[1]):
            faults.append(f"{what}: sha256 is the key's hash in 64 of 0-9 a-f, not the key")
            return None
    elif len(shown) != 1:
        faults.append(f"{what}: it has one of {', '.join(kinds)}, by which it is known")
        return None
    else:
        try:
            trait = certified(shown[0], given[shown[0]])
        except ValueError as e:
            faults.append(f"{what}: {e}")
            return None
    quotas.setdefault(tenant, Quota())
    return trait, given.get("name", ""), tenant, role == "operator"


def make(tenant: str, name: str = "", role: str = "user") -> tuple[str, str]:
    """A new key, and its entry for the file."""
    key = secrets.token_urlsafe(32)
    named = f"name = {_quoted(name)}\n" if name else ""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return key, f'[[keys]]\n{named}tenant = "{tenant}"\nrole = "{role}"\nsha256 = "{digest}"\n'


def _quoted(text: str) -> str:
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m server.keys",
        description="Make a key for a tenant: the key on standard output, its entry for --keys on standard error.",
        epilog="example: python -m server.keys acme > acme.key 2>> keys.toml",
    )
    parser.add_argument("tenant", help="whose sessions and quota; up to 32 of a-z 0-9 . _ -")
    parser.add_argument("--name", default="", help="for the log")
    parser.add_argument("--operator", action="store_true", help="may also change models, log levels and shared memory")
    given = parser.parse_args(argv)
    if not TENANT.fullmatch(given.tenant):
        parser.error(f"{given.tenant!r} is no name of up to 32 of a-z 0-9 . _ -")
    key, entry = make(given.tenant, given.name, ROLES[given.operator])
    print(entry, file=sys.stderr)
    say(key)
    return 0


if __name__ == "__main__":
    sys.exit(main())
