"""What an event's payload says, worked out in Python from the words of the specification alone."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any
from uuid import UUID

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
SKEW = timedelta(hours=1)

TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?"
    r"(?: ?(Z|[+-]\d\d(?::?\d\d)?))?)?",
    re.ASCII,
)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?", re.ASCII)
PLAIN_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,9})?", re.ASCII)
UUID_TEXT = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|[0-9a-fA-F]{32}")


class Unreadable(Exception):
    """The field that cannot be read."""


def number_text(number: Decimal) -> str:
    text = format(number, "f")
    return text.lstrip("-") if not number else text


def text_of(field: str, value: Any, numbers: bool = False) -> str:
    """A text of at most 200 characters; empty where there is none."""
    if value is None:
        return ""
    if numbers and isinstance(value, Decimal):
        value = number_text(value)
    if not isinstance(value, str) or len(value) > 200:
        raise Unreadable(field)
    return value


def moment(value: Any) -> datetime | None:
    """None where it is no time."""
    try:
        if isinstance(value, Decimal) or (isinstance(value, str) and PLAIN_NUMBER.fullmatch(value)):
            seconds = Decimal(value)
            if abs(seconds) >= 10**11:
                seconds /= 1000
            if abs(seconds) >= 10**11:
                return None
            whole = seconds.quantize(Decimal("1e-6"), ROUND_HALF_UP)
            return EPOCH + timedelta(microseconds=int(whole * 10**6))
        parts = TIME.fullmatch(value) if isinstance(value, str) else None
        if not parts:
            return None
        day, clock, seconds, fraction, zone = parts.groups()
        leap = seconds == "60"
        text = f"{day}T{clock or '00:00'}:{'59' if leap else seconds or '00'}"
        offset = "+00:00" if zone in (None, "Z") else zone
        if offset[1:3] > "15":
            return None
        at = datetime.fromisoformat(text + offset)
        at += timedelta(microseconds=round(int((fraction or "0").ljust(9, "0")) / 1000))
        return at + timedelta(seconds=1) if leap else at
    except ValueError:
        return None
    except OverflowError:
        return EPOCH  # far outside of what is accepted, on whichever side


def money(properties: dict[str, Any]) -> tuple[Decimal | None, str | None]:
    amount = properties.get("revenue")
    if amount is None:
        return None, None
    if isinstance(amount, str) and len(amount) <= 1000 and NUMBER.fullmatch(amount):
        amount = Decimal(amount)
    if not isinstance(amount, Decimal) or abs(amount) >= 10**15:
        raise Unreadable("properties.revenue")
    currency = properties.get("currency")
    if currency is None:
        return amount, "USD"
    if not isinstance(currency, str) or not re.fullmatch("[A-Za-z]{3}", currency):
        raise Unreadable("properties.currency")
    return amount, currency.upper()


def read(payload: Any, raw_id: UUID, received_at: datetime) -> dict[str, Any]:
    """The fields of the fact; numbers are expected as Decimal."""
    if not isinstance(payload, dict):
        raise Unreadable("payload")
    event_type = payload.get("event_type")
    if not isinstance(event_type, str) or not 1 <= len(event_type) <= 200:
        raise Unreadable("event_type")

    event_id = text_of("event_id", payload.get("event_id"), numbers=True)
    if not event_id:
        key = raw_id
    elif UUID_TEXT.fullmatch(event_id):
        key = UUID(event_id)
    else:
        key = UUID(hashlib.md5(event_id.encode()).hexdigest())

    account_id = text_of("account_id", payload.get("account_id"), numbers=True)
    if account_id == "*":
        raise Unreadable("account_id")
    user_id = text_of("user_id", payload.get("user_id"), numbers=True)

    field = "timestamp" if payload.get("occurred_at") is None else "occurred_at"
    value = payload.get(field)
    occurred_at = received_at if value is None else moment(value)
    if occurred_at is None or not EARLIEST <= occurred_at <= received_at + SKEW:
        raise Unreadable(field)

    geo = payload.get("geo")
    if geo is None:
        geo = {}
    if not isinstance(geo, dict):
        raise Unreadable("geo")
    places = {part: text_of(f"geo.{part}", geo.get(part)) for part in ("country", "region", "city")}

    properties = payload.get("properties")
    if properties is None:
        properties = {}
    if not isinstance(properties, dict):
        raise Unreadable("properties")
    revenue, currency = money(properties)
    return {
        "event_id": key,
        "event_type": event_type,
        "account_id": account_id,
        "user_id": user_id,
        "occurred_at": occurred_at,
        **places,
        "revenue": revenue,
        "currency": currency,
    }
