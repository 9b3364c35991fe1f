"""Deterministic events for the bench: skewed users, realistic payloads of about 365 bytes."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

SHARES = {
    "page_view": 55,
    "feature_used": 20,
    "api_request": 15,
    "signup": 4,
    "project_created": 4,
    "purchase": 2,
}
PLACES = [("DE", "Berlin", "Berlin"), ("US", "California", "San Jose"), ("FR", "", "Lyon")]
START = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 90


def payloads(count: int, seed: int = 1) -> Iterator[str]:
    """Yields `count` events as JSON texts, the same ones for the same seed.

    Users follow a power law (a tenth of them make about half of the events) over `count` / 20
    users of `count` / 500 accounts; times spread over 90 days from 2026-01-01, out of order.
    """
    rng = random.Random(seed)
    users = max(count // 20, 10)
    types = rng.choices(list(SHARES), list(SHARES.values()), k=4096)
    for number in range(count):
        user = int(users * rng.random() ** 3)
        event_type = types[number % 4096]
        properties: dict[str, object] = {
            "path": f"/projects/{rng.randrange(400)}/board",
            "referrer": "https://search.example/?q=analytics",
            "plan": ("free", "team", "pro")[user % 3],
            "latency_ms": rng.randrange(5, 900),
            "session": f"{rng.getrandbits(64):016x}",
        }
        if event_type == "purchase":
            properties["revenue"] = f"{rng.randrange(500, 20000) / 100:.2f}"
            properties["currency"] = "USD"
        country, region, city = PLACES[user % 3]
        yield json.dumps(
            {
                "event_id": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
                "event_type": event_type,
                "account_id": f"account-{user % max(users // 25, 1):06d}",
                "user_id": f"user-{user:08d}",
                "occurred_at": (START + timedelta(seconds=rng.random() * DAYS * 86400)).isoformat(),
                "geo": {"country": country, "region": region, "city": city},
                "properties": properties,
            }
        )
