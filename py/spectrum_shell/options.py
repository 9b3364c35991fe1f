"""Values of options, read and checked before anything is done."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

import click
import msgspec

from spectrum_shell.errors import Refused, Usage
from spectrum_shell.payload import encode_payload

_decode = msgspec.json.Decoder(float_hook=Decimal).decode
_NOT_JSON = (msgspec.DecodeError, UnicodeEncodeError, RecursionError)


def parse_delimiter(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """One character; ``tab`` and ``\\t`` are names of the tab."""
    if value in ("tab", "\\t"):
        return "\t"
    if value is not None and (len(value) != 1 or value in '"\r\n\0 '):
        raise click.BadParameter("one character is needed, and no quote, blank or line end")
    return value


def parse_time(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """A time as text; the database reads it, so this only finds what can be none."""
    if value is None:
        return None
    for read in (datetime.fromisoformat, float):
        try:
            read(value)
        except ValueError:
            continue
        return value
    raise click.BadParameter(f'"{value}" is neither ISO 8601 nor epoch seconds or milliseconds')


def parse_payload(
    given: Mapping[str, str | None], properties: Iterable[str], document: str | None
) -> dict[str, Any]:
    """The payload that track sends: the whole document, then the fields and properties on top.

    Raises Usage for options that are wrong, Refused for values that jsonb cannot hold.
    """
    payload = _parse_document(document) if document is not None else {}
    payload |= {name: value for name, value in given.items() if value is not None}
    added = dict(_parse_property(pair) for pair in properties)
    if added:
        present = payload.get("properties") or {}
        if not isinstance(present, dict):
            raise Usage("--json: properties is no object, so --property cannot add to it")
        payload["properties"] = present | added
    if not payload.get("event_type"):
        raise Usage("an event needs an EVENT_TYPE", "spectrum track signup --user u1")
    payload.setdefault("event_id", str(uuid4()))
    try:
        encode_payload(payload)
    except (ValueError, TypeError) as error:
        raise Refused(str(error)) from error
    return payload


def _parse_document(document: str) -> dict[str, Any]:
    try:
        payload = _decode(document)
    except _NOT_JSON as error:
        raise Usage(f"--json: {error}", "a JSON object is needed") from None
    if not isinstance(payload, dict):
        raise Usage("--json: this is no JSON object")
    return payload


def _parse_property(pair: str) -> tuple[str, Any]:
    name, divider, text = pair.partition("=")
    if not divider or not name:
        raise Usage(f'--property "{pair}" is no pair', "write --property NAME=VALUE")
    try:
        return name, _decode(text)
    except _NOT_JSON:
        return name, text
