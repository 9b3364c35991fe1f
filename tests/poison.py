"""Payloads that mean harm, as JSON text, made fast: hundreds of thousands in a run. Seeded, so
that a run can be repeated. Texts for jsonb only; what the server refuses at the INSERT is not here.
"""

from __future__ import annotations

import json
from random import Random

DEEP = 5_000
MEGABYTE = 1_000_000

NUMBERS = [
    "0", "-0", "0.0", "-0.0", "1", "-1", "1e400", "-1e400", "1e-400", "-1e-400", "1E+10", "1e1000",
    "1e15", "-1e15", "999999999999999", "1000000000000000", "-999999999999999", "-1000000000000000",
    "999999999999999.9999", "12345678901234567", "0.12345678901234567", "1.7976931348623157e308",
    "5e-324", "9007199254740993", "9223372036854775807", "9223372036854775808", "2147483648",
    "1e11", "99999999999", "100000000000", "99999999999999", "1e14", "1.5e9", "1700000000.123456",
    "1700000000123", "-62135596800", "253402300800", "9" * 250, "0." + "0" * 300 + "1",
    "1e100000", "1e-16000", "1" * 5_000 + "." + "1" * 5_000, "500", "499.999", "599",
]  # fmt: skip
UNICODE = [
    "a\u0300\u0301\u0302",  # combining marks
    "\u05d0\u202e\u0627\u2066x\u2069",  # right to left, overrides, isolates
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family, joined
    "\U0010ffff\U0001d11e", "\uffff", "\ufffe\ufdd0", "\ufeff", "\u200b\u200c\u200d\u2060",
    "\u0085\u2028\u2029", "\u0130\u0131\u1e9e\u00df\ufb03", "\u0663\u06f3\u0969\uff13",
    "\x7f\x1b[31m",
    "\x01\x08\x0c\n\r\t", "\u00a0 \u3000", "\u00e9", "e\u0301", "\ud7ff\ue000",
]  # fmt: skip
WORDS = [
    "", " ", "null", "true", "NaN", "Infinity", "-Infinity", "now", "infinity", "-infinity",
    "epoch",
    "today", "tomorrow", "allballs", "*", "**", "%", "_", "\\", "'", '"',
    "''; DROP TABLE raw_events;",
    "$$", "{}", "[]", "{1,2}", "\\N", "\\.", "__proto__", "constructor", "undefined", "0x10", "1e5",
    "12,5", "+1", ".5", "5.", "1_000", "day", "month", "YEAR", "usd", "EUR", "\u00e9ur",
    "K\u0130M", "purchase",
    "00000000-0000-0000-0000-000000000000", "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF",
    "00000000-0000-0000-0000-00000000000", "{00000000-0000-0000-0000-000000000000}",
    "(other properties)", "control", "treatment", "A" * 64, "x", "y",
]  # fmt: skip
NAMES = [
    "__proto__", "constructor", "", " ", "event_type", "properties", "id", "a.b", "a,b", "{a}", "0",
    "-1", "$", "'", '"', "\\", "%s", "{0}", "\u202e", "\uffff", "\U0001f600", "toString",
    "currency",
    "revenue", "k" * 200, "k" * 201, "\u00e9" * 200, "\U0001d11e" * 201, "K" * 5_000,
]  # fmt: skip
TIMES = [
    "2024-02-29", "2023-02-29", "2100-02-29", "2000-02-29", "2024-02-30", "2024-04-31",
    "2024-13-01", "2024-00-10", "2024-01-00", "2024-01-32", "0000-01-01", "0001-01-01",
    "99999-01-01", "2024-01-01 BC", "0044-03-15 BC", "10000-01-01T00:00:00Z",
    "9999-12-31T23:59:60Z",
    "2016-12-31T23:59:60Z", "2016-12-31T23:59:60.999999Z", "2016-12-31T23:59:61Z",
    "2024-03-31T02:30:00+01:00", "2024-03-31T02:30:00+02:00", "2024-03-31T02:30:00",
    "2024-10-27T02:30:00+02:00", "2024-10-27T02:30:00+01:00", "2024-03-10T02:30:00-05:00",
    "2024-11-03T01:30:00-04:00", "2024-11-03T01:30:00-05:00", "2024-03-31T02:30:00 Europe/Berlin",
    "2024-03-31 02:30:00 CET", "2024-06-01T24:00:00Z", "2024-06-01T23:60:00Z", "20240601",
    "20240601T120000Z", "2024-W01-1", "2024-153", "2024-6-1", "06/01/2024", "1 June 2024",
    "2024-06-01T12:00:00.1234567891Z", "2024-06-01T12:00:00.999999999Z", "2024-06-01T12",
    "2024-06-01T12:00:00+16:00", "2024-06-01T12:00:00+15:59", "2024-06-01T12:00:00-15:59:59",
    "2024-06-01T12:00:00\u2212" "01:00", "\uff12\uff10\uff12\uff14-06-01", "2024-06-01\n",
    " 2024-06-01",
    "2000-01-01T00:00:00Z", "1999-12-31T23:59:59.999999Z", "1999-12-31T23:59:59.9999999Z",
    "2000-01-01T00:00:00+01:00", "1970-01-01", "J2451187", "now", "infinity", "-infinity", "epoch",
    "2999-01-01T00:00:00Z", "1700000000", "1700000000000", "-1", "1e9", "1700000000.1234567890",
]  # fmt: skip
TYPES = [
    "signup", "purchase", "page_view", "session_start", "feature_used", "request", "api_request",
    "error", "subscription_started", "subscription_changed", "subscription_cancelled",
    "experiment_exposure", "$feature_flag_called", "refund", "identify",
]  # fmt: skip
READ_BY_REPORTS = [
    "revenue", "currency", "feature", "endpoint", "service", "version", "status", "latency_ms",
    "error", "mrr", "amount", "interval", "subscription_id", "plan", "experiment", "variant",
    "$feature_flag", "$feature_flag_response", "path", "url", "page", "referrer", "utm_source",
    "utm_medium", "utm_campaign", "duration", "n",
]  # fmt: skip

SHORT = ["'; --", "a\nb", "\u202eb", "**", "a b", '"', "\\", "\uffff", " ", "__proto__", "z"]

NESTS = {"[" * DEEP + "]" * DEEP: "[]", '{"a":' * DEEP + "0" + "}" * DEEP: "{}"}


def shallow(text: str) -> str:
    """The same with nests taken flat, for a reader that cannot go as deep."""
    for nest, flat in NESTS.items():
        text = text.replace(nest, flat)
    return text


def as_json(random: Random, text: str) -> str:
    return json.dumps(text, ensure_ascii=random.random() < 0.5)


class Poison:
    """Makes values, payloads and facts. `size` bounds the longest text, which is rare."""

    def __init__(self, seed: int | str, size: int = MEGABYTE) -> None:
        self.random = Random(seed)
        self.size = size
        self.made = 0

    def length(self) -> int:
        """Mostly short, at the borders now and then, up to the longest once in a while."""
        chance = self.random.random()
        if chance < 0.6:
            return self.random.randrange(1, 12)
        if chance < 0.9:
            return self.random.choice([2, 99, 100, 101, 199, 200, 201, 255, 256])
        if chance < 0.995:
            return self.random.choice([1_000, 2_700, 3_000, 8_191])
        return int(self.size ** self.random.uniform(0.7, 1))

    def text(self) -> str:
        random, chance = self.random, self.random.random()
        if chance < 0.25:
            return random.choice(WORDS)
        if chance < 0.4:
            return random.choice(TIMES)
        if chance < 0.5:
            return random.choice(NUMBERS)
        if chance < 0.6:
            return random.choice(UNICODE)
        length = self.length()
        if chance < 0.8:
            unit = random.choice([*UNICODE, "x", "\\", '"'])
            return (unit * (length // len(unit) + 1))[:length]
        # Noise does not compress.
        points = random.choice([(0x20, 0x7E), (0xA1, 0x7FF), (0x4E00, 0x9FFF), (0x10000, 0x1FFFF)])
        noise = "".join(chr(random.randint(*points)) for _ in range(min(length, 3_000)))
        return noise * max(1, length // 3_000)

    def number(self) -> str:
        random = self.random
        kind = random.randrange(5)
        if kind == 0:
            return str(random.randint(-(10**17), 10**17))
        if kind == 1:
            return repr(random.uniform(-1e16, 1e16))
        if kind == 2:
            return str(random.randint(1_600_000_000, 1_800_000_000))
        return random.choice(NUMBERS)

    def nest(self) -> str:
        return self.random.choice(list(NESTS))

    def name(self) -> str:
        random = self.random
        return as_json(random, random.choice(NAMES) if random.random() < 0.7 else self.text())

    def members(self, count: int, depth: int) -> str:
        return "{" + ",".join(f"{self.name()}:{self.value(depth)}" for _ in range(count)) + "}"

    def value(self, depth: int = 2) -> str:
        """Any JSON."""
        random, chance = self.random, self.random.random()
        if chance < 0.15:
            return random.choice(["null", "true", "false", "[]", "{}", '""', "[null]", "[[]]"])
        if chance < 0.4:
            return self.number()
        if chance < 0.8 or not depth:
            return as_json(random, self.text())
        if chance < 0.805:
            return self.nest()
        if chance < 0.9:
            items = (self.value(depth - 1) for _ in range(random.randrange(4)))
            return "[" + ",".join(items) + "]"
        return self.members(random.randrange(4), depth - 1)

    def many(self) -> str:
        """Thousands of properties."""
        return (
            "{" + ",".join(f'"k{n}":{n}' for n in range(self.random.choice([1_000, 4_000]))) + "}"
        )

    def when(self) -> str:
        random, chance = self.random, self.random.random()
        if chance < 0.4:
            return as_json(random, random.choice(TIMES))
        if chance < 0.6:
            return self.number()
        if chance < 0.8:
            digits = "".join(
                random.choice("0123456789-:TZ +.") for _ in range(random.randrange(26))
            )
            return as_json(random, digits)
        return self.value()

    def good(self) -> dict[str, str]:
        """The members of an event that can be read."""
        random, n = self.random, self.made
        return {
            "event_type": f'"{random.choice(TYPES)}"',
            "event_id": f'"event {n if n % 20 else 0}"',
            "occurred_at": f'"{self.day()}T12:{n % 60:02}:00Z"',
            "user_id": str(n % 50),
            "account_id": f'"account {n % 5}"',
            "geo": f'{{"country":"DE","city":"city {n % 9}"}}',
            "properties": f'{{"revenue":{n % 1_000}.25,"plan":"pro"}}',
        }

    def day(self) -> str:
        return f"2024-{self.random.randrange(1, 13):02}-{self.random.randrange(1, 29):02}"

    def payload(self) -> str:
        """An event with one or two members spoilt, or no event at all."""
        self.made += 1
        random, chance = self.random, self.random.random()
        if chance < 0.05:
            return self.value()
        members = self.good()
        for _ in range(random.choice([1, 1, 2])):
            name = random.choice(
                ["event_type", "event_id", "occurred_at", "timestamp", "user_id", "account_id",
                 "geo", "properties", "properties"]
            )  # fmt: skip
            if random.random() < 0.05:
                members.pop(name, None)
            else:
                members[name] = self.spoilt(name)
        if members.get("occurred_at") and "timestamp" in members and random.random() < 0.8:
            del members["occurred_at"]
        pairs = [f'"{name}":{value}' for name, value in members.items()]
        if random.random() < 0.05:
            # A name twice: the last counts.
            name = random.choice(list(members))
            pairs.append(f'"{name}":{self.spoilt(name)}')
        if random.random() < 0.05:
            pairs.insert(0, f"{self.name()}:{self.value()}")
        return "{" + ",".join(pairs) + "}"

    def spoilt(self, name: str) -> str:
        random = self.random
        if name in ("occurred_at", "timestamp"):
            return self.when()
        if name == "geo" and random.random() < 0.8:
            parts = random.sample(["country", "region", "city", "x"], random.randrange(1, 4))
            return "{" + ",".join(f'"{part}":{self.value(1)}' for part in parts) + "}"
        if name == "properties" and random.random() < 0.9:
            return self.properties()
        if random.random() < 0.5:
            return as_json(random, self.text())
        return self.value()

    def properties(self) -> str:
        random, chance = self.random, self.random.random()
        if chance < 0.003:
            return self.many()
        if chance < 0.3:
            return self.members(random.randrange(4), 1)
        names = random.sample(READ_BY_REPORTS, random.randrange(1, 5))
        return "{" + ",".join(f'"{name}":{self.value(1)}' for name in names) + "}"

    def fact(self) -> str:
        """An event that can be read, whose properties hold anything but bad money."""
        self.made += 1
        random, members = self.random, self.good()
        members["event_id"] = f'"fact {self.made}"'
        members["user_id"] = str(random.randrange(300))
        members["account_id"] = as_json(random, self.short_text(self.made % 12))
        names = {name: self.value(1) for name in random.sample(READ_BY_REPORTS, 12)}
        names |= {"revenue": self.amount(), "experiment": '"e"'}
        names["currency"] = random.choice(['"EUR"', '"usd"', "null"])
        if random.random() < 0.5:
            names["variant"] = random.choice(['"control"', '"treatment"'])
        if random.random() < 0.1:
            names[self.short_text(random.randrange(40))] = self.value(1)
        body = ",".join(f"{json.dumps(name)}:{value}" for name, value in names.items())
        if random.random() < 0.0003:
            body = self.many()[1:-1] + "," + body
        members["properties"] = "{" + body + "}"
        return "{" + ",".join(f'"{name}":{value}' for name, value in members.items()) + "}"

    def short_text(self, number: int) -> str:
        """A name that can be read, by number: the first three are as long and as odd as can be."""
        if number < 3:
            noise = Random(number)
            return "".join(chr(noise.randint(0x10000, 0x1FFFF)) for _ in range(200))
        return SHORT[number % len(SHORT)]

    def amount(self) -> str:
        return self.random.choice(
            ["0", "-0", "1e-400", "999999999999999", "-999999999999999.999", '"1e14"', '".5"',
             "0." + "1" * 5_000, "12.50", "null", "1e-16000"]
        )  # fmt: skip


def payloads(seed: int | str, count: int, size: int = MEGABYTE) -> list[str]:
    poison = Poison(seed, size)
    return [poison.payload() for _ in range(count)]


def facts(seed: int | str, count: int, size: int = MEGABYTE) -> list[str]:
    poison = Poison(seed, size)
    return [poison.fact() for _ in range(count)]
