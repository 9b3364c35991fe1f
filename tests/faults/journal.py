"""What the clients know, and nothing else: what each sent, and which commits were acknowledged."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from .events import mark_of


class Fate(Enum):
    """Of a transaction, as its client sees it."""

    OPEN = "its COMMIT was not sent: nothing of it may be there"
    SENT = "its COMMIT was sent and not answered: all of it or nothing"
    COMMITTED = "its COMMIT was acknowledged: all of it is there"


@dataclass
class Transaction:
    client: str
    payloads: list[str] = field(default_factory=list)
    fate: Fate = Fate.OPEN

    def marks(self) -> list[str]:
        return [mark_of(json.loads(payload)) for payload in self.payloads]


class Journal:
    """All transactions of all clients, entered before their COMMIT is sent."""

    def __init__(self) -> None:
        self._lock, self.transactions = threading.Lock(), list[Transaction]()

    def enter(self, client: str, payloads: list[str]) -> Transaction:
        transaction = Transaction(client, payloads)
        with self._lock:
            self.transactions.append(transaction)
        return transaction

    @contextmanager
    def committing(self, transaction: Transaction) -> Iterator[None]:
        """Around what commits. Whatever error ends it, the answer alone may be lost."""
        transaction.fate = Fate.SENT
        yield
        transaction.fate = Fate.COMMITTED
