"""What a client's certificate says of its owner, for `[[certificates]]` of the keys' file (keys.py). TLS has held it against the
authority and its dates before; nothing is verified here.

The only file that imports `cryptography` (the extra `mtls`), and only where certificates are mapped.
"""

from __future__ import annotations

import hashlib
from typing import Any

Trait = tuple[str, str]
"""Something that is said of an owner, and how: ("uri", "spiffe://acme.example/batch")."""

KINDS = ("uri", "dns", "email", "subject", "sha256")


def traits(der: bytes) -> tuple[Trait, ...]:
    """All that a certificate can be known by: its alternative names, its subject, its own hash. Raises ValueError."""
    x509 = _library()
    try:
        read = x509.load_der_x509_certificate(der)
        found: list[Trait] = [("sha256", hashlib.sha256(der).hexdigest())]
        if subject := read.subject.rfc4514_string():
            found.append(("subject", subject))
        try:
            names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return tuple(found)
        found += [("uri", name) for name in names.get_values_for_type(x509.UniformResourceIdentifier)]
        found += [("dns", name.lower()) for name in names.get_values_for_type(x509.DNSName)]
        found += [("email", name) for name in names.get_values_for_type(x509.RFC822Name)]
    except Exception as e:  # the library has errors of its own, straight from Exception, for versions and names that it does not know
        raise ValueError(f"the certificate can't be read: {e}") from None
    return tuple(found)


def trait(kind: str, value: str) -> Trait:
    """The same as an operator writes it: a subject as RFC 4514 has it (`CN=batch,O=Acme`). Raises ValueError with what to write."""
    value = value.strip()
    if kind == "subject":
        x509 = _library()
        try:
            value = x509.Name.from_rfc4514_string(value).rfc4514_string()
        except ValueError:
            raise ValueError("subject is a name such as CN=batch,O=Acme") from None
    elif kind == "sha256":
        value = value.replace(":", "").lower()
        if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise ValueError("sha256 is a certificate's fingerprint in 64 of 0-9 a-f")
    elif kind == "dns":
        value = value.lower()
    if not value:
        raise ValueError(f"{kind} is empty")
    return kind, value


def _library() -> Any:
    try:
        from cryptography import x509
    except ImportError:
        raise ValueError("[[certificates]] need a library to read them: pip install 'seqserve[mtls]'") from None
    return x509
