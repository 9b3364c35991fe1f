"""What the clients send: a shop's events, with everything that makes trouble."""

from __future__ import annotations

import json
import threading
from collections import deque
from datetime import datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

USERS, ACCOUNTS = 40, ("acme", "globex")
EVENT_TYPES = ("visit", "visit", "visit", "view", "view", "signup", "cart", "purchase", "refund")
FUNNEL = ("visit", "cart", "purchase")  # within two days: defined as `pays`, never again
UNREADABLE: tuple[dict[str, Any], ...] = (
    {"event_type": None},
    {"event_type": ""},
    {"event_type": ["visit"]},
    {"occurred_at": "yesterday"},
    {"occurred_at": "2025-02-30"},
    {"occurred_at": "1999-12-31T23:59:59Z"},
    {"occurred_at": "2999-01-01"},
    {"account_id": "*"},
    {"user_id": {"id": 1}},
    {"user_id": "u" * 201},
    {"event_id": [1]},
    {"geo": 7},
    {"geo": {"city": 7}},
    {"properties": "none"},
    {"properties": {"revenue": "n/a"}},
    {"properties": {"revenue": 1e15}},
    {"properties": {"revenue": 1, "currency": "EURO"}},
)


class KnownIds:
    """The event_ids that were sent lately, by whom ever, committed or not: copies take them."""

    def __init__(self) -> None:
        self._lock, self._ids = threading.Lock(), deque[str](maxlen=300)

    def add(self, event_id: str) -> None:
        with self._lock:
            self._ids.append(event_id)

    def choose(self, random: Random) -> str | None:
        with self._lock:
            return random.choice(self._ids) if self._ids else None


class Source:
    """One client's events; each carries a mark that no other has, beside what Spectrum reads."""

    def __init__(self, name: str, seed: str, known: KnownIds, today: datetime) -> None:
        self.name, self.random, self.known, self.today = name, Random(seed), known, today
        self.sent = 0

    def _moment(self) -> str | None:
        chance = self.random.random()
        if chance < 0.03:
            return None  # when it was received
        # Most within two months, some late by up to eight months: months that do not exist yet.
        days = self.random.randrange(240) if chance < 0.06 else self.random.randrange(60)
        seconds = self.random.randrange(86_400)
        return (self.today - timedelta(days=days + 1, seconds=seconds)).isoformat()

    def payload(self, copies: float = 0.08, unreadable: float = 0.04) -> str:
        """As JSON text."""
        random = self.random
        mark = f"{self.name}.{self.sent}"
        self.sent += 1
        chance = random.random()
        if chance < unreadable / 4:
            return json.dumps([mark])
        user = random.randrange(USERS)
        account = ACCOUNTS[user % 2 if random.random() < 0.9 else random.randrange(2)]
        event: dict[str, Any] = {
            "mark": mark,
            "event_type": random.choice(EVENT_TYPES),
            "user_id": f"u{user}",
            "account_id": account,
            "occurred_at": self._moment(),
            "event_id": self._event_id(copies),
        }
        for field in ("user_id", "account_id"):
            if random.random() < 0.04:
                del event[field]
        if random.random() < 0.3:
            event["geo"] = {"country": random.choice(["DE", "US"])}
        if event["event_type"] in ("purchase", "refund"):
            event["properties"] = {"revenue": random.choice([5, 7.25, "12.50", 19.99, 100, -3])}
            if random.random() < 0.2:
                event["properties"]["currency"] = "EUR"
        if chance < unreadable:
            event |= random.choice(UNREADABLE)
        return json.dumps(event)

    def _event_id(self, copies: float) -> str | None:
        random = self.random
        if random.random() < copies and (known := self.known.choose(random)):
            return known
        if random.random() < 0.03:
            return None  # the raw row's own
        event_id = str(UUID(int=random.getrandbits(128), version=4))
        if random.random() < 0.2:
            event_id = f"order {event_id[:8]}"
        self.known.add(event_id)
        return event_id


def mark_of(payload: Any) -> str:
    return payload["mark"] if isinstance(payload, dict) else payload[0]
