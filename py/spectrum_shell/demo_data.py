"""The first month of Tideline, a small SaaS that does not exist.

Plain Python and seeded: the same seed and the same last day tell the same story. How its events
reach the database, late, twice or broken, is the matter of `demo_delivery`.

    people      visitors who may sign up, build and buy, and colleagues who are invited
    accounts    companies with subscriptions and invoices
    bystanders  page views that nobody signed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from random import Random
from typing import Any, TypeVar

SEED = 22
DAYS = 30

VISITORS = 1250
INVITED = 250
BYSTANDER_VIEWS = 1600

FUNNEL = ("visit", "signup", "project_created", "purchase")
EXPERIMENT = "guided_setup"
SIGNUP_RATE = 0.52
BUILD_RATE = {"control": 0.50, "treatment": 0.64}
PURCHASE_RATE = 0.38
TWO_VARIANTS_RATE = 0.008

WEEKDAYS = (1.0, 1.1, 1.12, 1.05, 0.9, 0.42, 0.38)
HOURS = (1, 1, 1, 1, 1, 2, 4, 8, 16, 22, 22, 19, 15, 18, 20, 18, 15, 12, 9, 8, 7, 5, 3, 2)
GROWTH = 1.025

FEATURES = {
    "board": 40,
    "timeline": 24,
    "comments": 20,
    "search": 14,
    "export": 6,
    "automation": 4,
    "api_keys": 1,
}
APP_PAGES = (
    "/home",
    "/projects",
    "/projects/board",
    "/projects/timeline",
    "/team",
    "/settings",
    "/reports",
)
SITE_PAGES = ("/", "/features", "/pricing", "/customers", "/blog/planning-with-tides", "/docs")
SOURCES = {"google": 40, "newsletter": 15, "linkedin": 12, "partner": 8, "": 25}
PLANS = {"starter": 49, "team": 149, "business": 499}
ADD_ONS = {"template_pack": 19, "extra_seats": 48, "priority_support": 99, "onboarding_call": 240}
# endpoint: service, median milliseconds, spread (sigma of the logarithm)
ENDPOINTS = {
    "/v1/projects": ("core", 38, 0.45),
    "/v1/tasks": ("core", 24, 0.40),
    "/v1/search": ("search", 85, 0.60),
    "/v1/export": ("export", 620, 0.70),
    "/v1/login": ("identity", 110, 0.35),
}
# The search service has a bad release for two days.
BAD_RELEASE_DAYS = (17, 18)


@dataclass(frozen=True, slots=True)
class Place:
    country: str
    region: str
    city: str
    utc_offset: float


PLACES = {
    Place("US", "California", "San Francisco", -8): 16,
    Place("US", "New York", "New York", -5): 14,
    Place("US", "Texas", "Austin", -6): 8,
    Place("CA", "Quebec", "Montréal", -5): 5,
    Place("BR", "São Paulo", "São Paulo", -3): 5,
    Place("GB", "England", "London", 0): 13,
    Place("IE", "Leinster", "Dublin", 0): 4,
    Place("DE", "Berlin", "Berlin", 1): 10,
    Place("FR", "Île-de-France", "Paris", 1): 7,
    Place("ES", "Cataluña", "Barcelona", 1): 4,
    Place("IN", "Karnataka", "Bengaluru", 5.5): 8,
    Place("JP", "Tokyo", "Tokyo", 9): 5,
    Place("AU", "New South Wales", "Sydney", 10): 4,
}


@dataclass(frozen=True, slots=True)
class Account:
    account_id: str
    place: Place
    currency: str
    starts_on: int
    plan: str
    yearly: bool
    weight: float


@dataclass(frozen=True, slots=True)
class Person:
    user_id: str
    account: Account | None
    place: Place
    weight: float
    rng: Random = field(repr=False)


@dataclass(frozen=True, slots=True)
class Event:
    at: datetime
    event_type: str
    person: Person | None = None
    account: Account | None = None
    properties: dict[str, Any] = field(default_factory=dict)


class Story:
    """Who is there, and what they do."""

    def __init__(self, until: date, seed: int, days: int) -> None:
        self.seed = seed
        self.days = days
        self.until = until
        self.ends = datetime.combine(until, time(), UTC) + timedelta(days=1)
        self.starts = self.ends - timedelta(days=days)
        self.rng = self.random("story")
        self.day_weights = [self.day_weight(day) for day in range(days)]
        self.accounts = list(self._accounts())

    def random(self, *names: object) -> Random:
        """A generator of its own for each thing named: a change to one leaves the others alone."""
        return Random("/".join(str(name) for name in (self.seed, *names)))

    def weekday_weight(self, day: int) -> float:
        return WEEKDAYS[(self.starts + timedelta(days=day)).weekday()]

    def day_weight(self, day: int) -> float:
        return self.weekday_weight(day) * GROWTH**day

    def moment(self, rng: Random, day: int, place: Place) -> datetime:
        """A moment of that day, by the clock of the place."""
        seconds = pick(rng, HOURS) * 3600 + rng.uniform(0, 3600)
        return self.starts + timedelta(days=day, seconds=seconds - place.utc_offset * 3600)

    def events(self) -> Iterator[Event]:
        yield Event(
            self.starts,
            "launch",
            properties={"product": "Tideline", "days": self.days, "until": self.until.isoformat()},
        )
        for number in range(VISITORS):
            yield from self.visitor(self.person("visitor", number))
        for number in range(INVITED):
            yield from self.colleague(self.person("invited", number))
        for account in self.accounts:
            yield from self.billing(account)
        yield from self.bystanders()

    # People

    def person(self, kind: str, number: int) -> Person:
        rng = self.random(kind, number)
        account = None
        if kind == "invited" or rng.random() < 0.9:
            account = pick_key(rng, {account: account.weight for account in self.accounts})
        near = account is not None and rng.random() < 0.7
        return Person(
            user_id=f"{kind[0]}{number:04d}",
            account=account,
            place=account.place if near else pick_key(rng, PLACES),
            weight=min(rng.lognormvariate(0, 0.8), 6.0),
            rng=rng,
        )

    def visitor(self, person: Person) -> Iterator[Event]:
        """Visits, perhaps signs up, builds and buys, all within 12 days of the first visit."""
        rng = person.rng
        visited = self.moment(rng, pick(rng, self.day_weights), person.place)
        yield from self.visit(person, visited)
        if rng.random() >= SIGNUP_RATE:
            if rng.random() < 0.25:
                yield from self.visit(person, visited + timedelta(days=rng.uniform(0.5, 9)))
            return

        signed_up = visited + timedelta(minutes=rng.uniform(4, 25))
        if rng.random() < 0.35:
            second_visit = visited + timedelta(days=rng.uniform(0.5, 3))
            yield from self.visit(person, second_visit)
            signed_up = second_visit + timedelta(minutes=rng.uniform(4, 25))
        yield self.event(
            person, signed_up, "signup", method=rng.choice(("email", "google", "email", "sso"))
        )

        variant = rng.choice(("control", "treatment"))
        yield from self.exposures(person, signed_up + timedelta(seconds=2), variant)
        built = bought = None
        if rng.random() < BUILD_RATE[variant]:
            built = signed_up + timedelta(minutes=1 + min(rng.lognormvariate(3.2, 1.6), 4000))
            yield self.event(
                person,
                built,
                "project_created",
                template=rng.choice(("blank", "roadmap", "sprint")),
            )
            if rng.random() < PURCHASE_RATE:
                bought = built + timedelta(hours=min(rng.lognormvariate(3.3, 1.0), 140))
                yield from self.purchases(person, bought)
        yield from self.use_of_app(person, signed_up, built, bought)

    def visit(self, person: Person, at: datetime) -> Iterator[Event]:
        rng = person.rng
        source = pick_key(rng, SOURCES)
        properties = (
            {"utm_source": source, "utm_medium": "cpc"}
            if source == "google"
            else {"utm_source": source}
        )
        yield self.event(person, at, "visit", **(properties if source else {"landing": "/"}))
        for _ in range(1 + min(int(rng.expovariate(0.6)), 6)):
            at += timedelta(seconds=rng.uniform(4, 75))
            yield self.event(person, at, "page_view", path=rng.choice(SITE_PAGES))

    def exposures(self, person: Person, at: datetime, variant: str) -> Iterator[Event]:
        """Some are exposed again, and a few of them to the other variant, on a second device."""
        rng = person.rng
        yield self.event(person, at, "experiment_exposure", experiment=EXPERIMENT, variant=variant)
        again = at + timedelta(hours=rng.uniform(2, 60))
        if rng.random() < TWO_VARIANTS_RATE:
            other = "control" if variant == "treatment" else "treatment"
            yield self.event(
                person, again, "experiment_exposure", experiment=EXPERIMENT, variant=other
            )
        elif rng.random() < 0.3:
            yield self.event(
                person, again, "experiment_exposure", experiment=EXPERIMENT, variant=variant
            )

    def purchases(self, person: Person, at: datetime) -> Iterator[Event]:
        rng = person.rng
        while at < self.ends:
            item = pick_key(
                rng,
                {"template_pack": 6, "extra_seats": 5, "priority_support": 2, "onboarding_call": 1},
            )
            quantity = rng.randint(1, 4) if item == "extra_seats" else 1
            price = ADD_ONS[item] * quantity
            currency = person.account.currency if person.account else "USD"
            yield self.event(
                person,
                at,
                "purchase",
                item=item,
                quantity=quantity,
                revenue=price,
                currency=currency,
            )
            if rng.random() < 0.06:
                returned = at + timedelta(days=rng.uniform(0.3, 6))
                yield self.event(
                    person, returned, "refund", item=item, revenue=price, currency=currency
                )
            at += timedelta(days=rng.uniform(3, 24))

    def colleague(self, person: Person) -> Iterator[Event]:
        """Comes by invitation: no visit, no sign-up, at work from the first day."""
        rng = person.rng
        earliest = person.account.starts_on
        day = earliest + pick(rng, self.day_weights[earliest:])
        joined = self.moment(rng, day, person.place)
        yield self.event(
            person, joined, "invitation_accepted", role=rng.choice(("member", "member", "admin"))
        )
        yield from self.use_of_app(person, joined, joined, None)

    def use_of_app(
        self, person: Person, joined: datetime, built: datetime | None, bought: datetime | None
    ) -> Iterator[Event]:
        """Sessions of the days after joining: fewer with time and on weekends."""
        rng = person.rng
        yield from self.session(person, joined + timedelta(minutes=rng.uniform(1, 3)))
        for day in range((joined - self.starts).days + 1, self.days):
            at = self.moment(rng, day, person.place)
            age = (at - joined).days
            if bought and at > bought:
                chance = 0.30 + 0.50 * 0.96**age
            elif built and at > built:
                chance = 0.12 + 0.50 * 0.90**age
            else:
                chance = 0.02 + 0.30 * 0.75**age
            if rng.random() < chance * self.weekday_weight(day) * (
                0.6 + 0.4 * min(person.weight, 2)
            ):
                for _ in range(1 + min(int(rng.expovariate(1.6 / person.weight)), 4)):
                    yield from self.session(person, at)
                    at += timedelta(hours=rng.uniform(1, 4))

    def session(self, person: Person, at: datetime) -> Iterator[Event]:
        rng = person.rng
        for _ in range(1 + min(int(rng.expovariate(0.45 / person.weight)), 25)):
            yield self.event(person, at, "page_view", path=rng.choice(APP_PAGES))
            yield self.api_request(person, at)
            if rng.random() < 0.6:
                at += timedelta(seconds=rng.uniform(3, 60))
                yield self.event(person, at, "feature_used", feature=pick_key(rng, FEATURES))
            at += timedelta(seconds=min(5 + rng.expovariate(1 / 80), 1200))

    def api_request(self, person: Person, at: datetime) -> Event:
        rng = person.rng
        endpoint = pick_key(
            rng,
            {"/v1/tasks": 10, "/v1/projects": 7, "/v1/search": 4, "/v1/login": 2, "/v1/export": 1},
        )
        service, median, spread = ENDPOINTS[endpoint]
        day = (at - self.starts).days
        latency = median * rng.lognormvariate(0, spread)
        version, error_rate = ("2.3.0", 0.004) if day < BAD_RELEASE_DAYS[0] else ("2.4.1", 0.003)
        if service == "search" and day in BAD_RELEASE_DAYS:
            version, error_rate, latency = "2.4.0", 0.12, latency * 3
        status = rng.choice((500, 502, 504)) if rng.random() < error_rate else 200
        if status == 200 and rng.random() < 0.015:
            status = rng.choice((400, 403, 404))
        return self.event(
            person,
            at,
            "api_request",
            service=service,
            endpoint=endpoint,
            version=version,
            status=status,
            latency_ms=round(latency, 1),
        )

    def event(self, person: Person, at: datetime, event_type: str, **properties: Any) -> Event:
        return Event(at, event_type, person, person.account, properties)

    # Accounts

    def _accounts(self) -> Iterator[Account]:
        """25 companies; the last one has a name that has to be quoted."""
        names = (
            "Acorn Robotics",
            "Bluefin Travel",
            "Cobalt Labs",
            "Dovetail Studio",
            "Ember Energy",
            "Foxglove Health",
            "Granite Legal",
            "Harbour Foods",
            "Inkwell Press",
            "Juniper Bank",
            "Kestrel Air",
            "Lantern Games",
            "Meadow Dairy",
            "Nimbus Weather",
            "Orchard Schools",
            "Pebble Toys",
            "Quartz Optics",
            "Rowan Farms",
            "Saffron Kitchens",
            "Thistle Post",
            "Umber Paints",
            "Velvet Rope",
            "Willow Clinics",
            "Yarrow Tea",
            "O'Brien & Sons",
        )
        for number, name in enumerate(names):
            rng = self.random("account", number)
            place = pick_key(rng, PLACES)
            weight = 1.5 * rng.lognormvariate(0, 0.9)
            yield Account(
                account_id=name,
                place=place,
                currency="EUR" if place.country in ("DE", "FR", "ES", "IE") else "USD",
                starts_on=rng.randint(0, 3) if number % 3 else rng.randint(4, 20),
                plan=pick_key(rng, {"starter": 4, "team": 4, "business": 2}),
                yearly=number % 8 == 3,
                weight=min(weight, 6.0) if number < 24 else 2.0,
            )

    def billing(self, account: Account) -> Iterator[Event]:
        """One subscription: an invoice when it starts, for most a change or an end later."""
        rng = self.random("billing", account.account_id)
        started = self.moment(rng, account.starts_on, account.place)
        mrr = PLANS[account.plan]
        yield self.subscription(account, started, "started", mrr)
        # The billing system writes its amounts as text.
        amount = mrr * 10 if account.yearly else mrr
        invoice = {"invoice": f"T-{rng.randint(10000, 99999)}", "revenue": f"{amount:.2f}"}
        yield Event(
            started, "invoice_paid", None, account, {**invoice, "currency": account.currency}
        )

        turn = rng.random()
        later = started + timedelta(days=rng.uniform(4, 12))
        if turn < 0.30:
            yield self.subscription(account, later, "changed", mrr + rng.choice((20, 50, 100)))
        elif turn < 0.42:
            yield self.subscription(account, later, "changed", round(mrr * 0.6))
        elif turn < 0.58:
            yield self.subscription(account, later, "cancelled", mrr)
            if rng.random() < 0.5:
                yield self.subscription(
                    account, later + timedelta(days=rng.uniform(3, 8)), "started", mrr
                )

    def subscription(self, account: Account, at: datetime, what: str, mrr: int) -> Event:
        price = {"amount": mrr * 10, "interval": "year"} if account.yearly else {"mrr": mrr}
        if what == "cancelled":
            price = {}
        properties = {
            "subscription_id": f"sub-{account.account_id.split()[0].lower()}",
            "plan": account.plan,
        }
        return Event(
            at,
            f"subscription_{what}",
            None,
            account,
            {**properties, **price, "currency": account.currency},
        )

    # Bystanders

    def bystanders(self) -> Iterator[Event]:
        """Page views without a user: no cookie, no name; half of them on an account's own pages."""
        rng = self.random("bystanders")
        nobody = Person("", None, next(iter(PLACES)), 1.0, rng)
        for _ in range(BYSTANDER_VIEWS):
            at = self.moment(rng, pick(rng, self.day_weights), nobody.place)
            account = rng.choice(self.accounts) if rng.random() < 0.5 else None
            yield Event(at, "page_view", None, account, {"path": rng.choice(SITE_PAGES)})


Key = TypeVar("Key")


def pick(rng: Random, weights: Sequence[float]) -> int:
    """An index, as often as its weight says."""
    return rng.choices(range(len(weights)), weights)[0]


def pick_key(rng: Random, weights: Mapping[Key, float]) -> Key:
    return rng.choices(list(weights), list(weights.values()))[0]
