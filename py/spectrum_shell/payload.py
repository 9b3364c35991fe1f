"""The payload of an event: its fields, and Python values as JSON that the server takes."""

import math
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

# The fields that Spectrum reads at the top of a payload; geo and properties hold further ones.
FIELDS = (
    "event_id",
    "event_type",
    "account_id",
    "user_id",
    "occurred_at",
    "timestamp",
    "geo",
    "properties",
)
GEO_FIELDS = ("country", "region", "city")

encode_json = msgspec.json.Encoder(decimal_format="number").encode

# \u0000 after an even number of backslashes is the character NUL, after an odd one plain text.
_NUL_ESCAPE = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_LARGEST_PLAIN_INT = 2**63


def holds_nul(document: bytes) -> bool:
    """True if a JSON document holds the character NUL, which jsonb cannot store."""
    return b"\\u0000" in document and _NUL_ESCAPE.search(document) is not None


def encode_payload(payload: Mapping[str, Any]) -> str:
    """The payload as JSON text that raw_events takes.

    Decimals keep their digits; UUIDs, dates and times become text (ISO 8601). Raises ValueError
    or TypeError, naming the field, for what JSON or jsonb cannot hold: NaN, infinity, the
    character NUL, lone surrogates, other types.
    """
    return encode_json(_plain(payload, "payload")).decode()


def _plain(value: Any, name: str) -> Any:
    """The value in types that the encoder writes without loss."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked_text(str.__str__(value), name)
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < _LARGEST_PLAIN_INT else Decimal(value)
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise ValueError(f"{name}: {value} is no number in JSON")
        return value
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {_key(key, name): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{place}]") for place, item in enumerate(value)]
    raise TypeError(f"{name}: a {type(value).__name__} cannot stand in an event")


def _key(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{name}: the key {key!r} is no text")
    return _checked_text(key, name)


def _checked_text(text: str, name: str) -> str:
    if "\0" in text:
        raise ValueError(f"{name}: the character NUL cannot be stored")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}: a lone surrogate is no character") from None
    return text
