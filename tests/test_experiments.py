"""Experiments: units, windows and sums against an oracle, statistics against SciPy."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any
from uuid import UUID

import psycopg
import pytest
from experiments import EVEN, START, define, happening, seen
from histories import Payload, exploring, load, loaded, properties, values
from hypothesis import given
from hypothesis import strategies as st
from oracle_events import of_account, read_events
from oracle_experiments import Experiment, Metric, results, units_of
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb


def ask(db: psycopg.Connection, query: str, *arguments: object) -> dict[tuple[str, ...], dict]:
    rows = db.cursor(row_factory=dict_row).execute(query, arguments).fetchall()
    return {(row["account_id"], row["metric"], row["variant"]): row for row in rows}


def assert_same(
    answer: Mapping[tuple[str, ...], Mapping[str, Any]],
    expected: Mapping[tuple[str, ...], Mapping[str, Any]],
) -> None:
    assert answer.keys() == expected.keys()
    for key, wanted in expected.items():
        for column in COLUMNS:
            value, right = answer[key][column], wanted.get(column)
            if isinstance(right, float) and value is not None:
                close = math.isclose(value, right, rel_tol=1e-9, abs_tol=1e-12)
            else:
                close = value == right
            assert close, (key, column, value, right, answer[key], wanted)


COLUMNS = (
    "is_control", "units", "excluded_units", "conversions", "value", "ci_low", "ci_high",
    "difference", "difference_low", "difference_high", "lift", "lift_low", "lift_high",
    "p_value", "p_adjusted", "srm_p_value", "is_reliable", "chance_to_win", "credible_low",
    "credible_high", "expected_loss", "winsor_low", "winsor_high", "theta", "variance_reduction",
    "is_sequential",
)  # fmt: skip


def expected_of(
    history: Sequence[Mapping[str, Any]], experiment: Experiment, accounts: Sequence[str | None]
) -> dict[tuple[str, ...], dict[str, Any]]:
    events = read_events(history)
    return {
        (account or "*", *key): row
        for account in accounts
        for key, row in results(events, experiment, account).items()
    }


# Random histories: who is a unit, and what counts for him.
METRICS = (
    Metric("bought", "proportion", "purchase"),
    Metric("bought soon", "proportion", "purchase", window=timedelta(days=1)),
    Metric("spent", "mean", "purchase", wanted="amount"),
    Metric("pro visits", "mean", "visit", window=timedelta(days=7), where={"plan": "pro"}),
    Metric("per visit", "ratio", "purchase", wanted="amount", lower_event="visit"),
    Metric(
        "share", "ratio", "visit", where={"plan": "pro"}, window=timedelta(days=30),
        lower_event="visit", lower_wanted="amount", is_guardrail=True,
    ),
)  # fmt: skip
names = st.sampled_from(["exp"] * 12 + ["other", None])
variants = st.sampled_from(["control"] * 8 + ["treatment"] * 8 + ["unplanned", "", None, True, 1])
exposures = st.one_of(
    st.fixed_dictionaries({"experiment": names, "variant": variants}),
    st.fixed_dictionaries({"$feature_flag": names, "$feature_flag_response": variants}),
)
deeds = properties(amount=values, plan=st.sampled_from(["pro", "free"]))
hours = st.sampled_from([0, 0, 1, 2, 24, 25, 48, 168, 169, 720]).map(lambda n: timedelta(hours=n))
ends = st.one_of(st.none(), st.none(), hours.map(lambda after: START + after))


def happenings(
    kinds: Sequence[str], of: st.SearchStrategy[Payload], many: int
) -> st.SearchStrategy:
    """Lists of events of a few users, who are at home in one account and guests in another."""
    event = st.builds(
        lambda kind, user, account, after, properties: {
            "event_type": kind, "occurred_at": (START + after).isoformat(),
            "properties": properties,
        } | ({"user_id": f"u{user}"} if user else {})
        | ({"account_id": account} if account else {}),
        st.sampled_from(kinds), st.integers(0, 8), st.sampled_from(["a1"] * 6 + ["a2", None]),
        hours, of,
    )  # fmt: skip
    return st.lists(event, min_size=many // 2, max_size=many)


methods = st.fixed_dictionaries({}, optional={
    "winsorize": st.sampled_from([0.6, 0.75, 0.99]),
    "cuped": st.sampled_from([timedelta(hours=2), timedelta(days=1), timedelta(days=30)]),
    "sequential": st.sampled_from([1, 20, 5000]),
    "correction": st.just("benjamini_hochberg"),
})  # fmt: skip


@exploring
@given(data=st.data(), chosen=methods)
def test_any_history(
    db: psycopg.Connection, data: st.DataObject, chosen: Mapping[str, Any]
) -> None:
    history = data.draw(happenings(["experiment_exposure", "$feature_flag_called"], exposures, 16))
    history += data.draw(happenings(["purchase", "visit"], deeds, 40))
    start, end = data.draw(st.tuples(ends, ends).filter(lambda r: None in r or r[0] <= r[1]))
    plan = data.draw(st.sampled_from([EVEN, {"control": 1, "treatment": 2, "true": 3}]))
    experiment = Experiment("exp", plan, "control", METRICS, start, end, confidence=0.9, **chosen)
    with loaded(db, history):
        define(db, experiment)
        answer = ask(db, "SELECT * FROM analytics.experiment('exp')")
        assert_same(answer, expected_of(history, experiment, [None]))
        answer = ask(db, "SELECT * FROM analytics.experiment('exp', 'a1')")
        assert_same(answer, expected_of(history, experiment, ["a1"]))
        db.execute("CALL spectrum.refresh_analytics()")
        standing = ask(db, "SELECT * FROM analytics.experiment_results")
        seen = [
            account for account in ("a1", "a2")
            if any(units_of(of_account(read_events(history), account), experiment))
        ]  # fmt: skip
        assert_same(standing, expected_of(history, experiment, [None, *seen]))


@exploring
@given(random=st.randoms(use_true_random=True))
def test_standing_results_follow_what_happens(db: psycopg.Connection, random: Random) -> None:
    """Late events, events corrected, definitions changed, refreshes in between that get only some
    of it done: in the end the view shows what all events say."""

    def any_event(number: int) -> Payload:
        user = random.randrange(9)
        kind = random.choice(["experiment_exposure", "$feature_flag_called"] + ["purchase"] * 4)
        variant = random.choice(["control", "treatment"] if random.random() < 0.1 else
                                [("control", "treatment", "unplanned")[user % 3]])  # fmt: skip
        after = timedelta(hours=random.choice([0, 1, 5, 24, 25, 26, 48, 168, 720]))
        seen = {"experiment": "exp", "variant": variant}
        if kind == "$feature_flag_called":
            seen = {"$feature_flag": "exp", "$feature_flag_response": variant}
        done = {"amount": random.choice([1, 2.5, 10, 1000, "n/a"])}
        if random.random() < 0.5:
            done["plan"] = "pro"
        account = f"a{user % 2}" if random.random() < 0.9 else random.choice(["a1", None])
        return {
            "event_id": str(UUID(int=number + 1)), "event_type": kind,
            "occurred_at": (START + after).isoformat(),
            "properties": done if kind == "purchase" else seen,
        } | ({"user_id": f"u{user}"} if user else {}) | (
            {"account_id": account} if account else {})  # fmt: skip

    def any_experiment() -> Experiment:
        return Experiment(
            "exp", random.choice([EVEN, {"control": 1, "treatment": 2, "unplanned": 3}]), "control",
            random.sample(METRICS, random.randint(1, 3)),
            *random.choice([(None, None), (START, None), (None, START + timedelta(hours=25))]),
            winsorize=random.choice([None, None, 0.75]),
            cuped=random.choice([None, timedelta(hours=2), timedelta(days=30)]),
        )  # fmt: skip

    with db.transaction(force_rollback=True):
        history: list[Payload] = []
        experiment = any_experiment()
        define(db, experiment)
        for _ in range(12):
            action = random.choice(["more", "more", "correct", "some", "refresh", "define"])
            if action == "more":
                more = [any_event(len(history) + n) for n in range(random.choice([1, 10, 30]))]
                history += more
                load(db, more)
            elif action == "correct" and history:
                wrong = random.randrange(len(history))
                history[wrong] = any_event(wrong)
                db.execute(
                    "UPDATE raw_events SET payload = %s, status = 'pending'"
                    " WHERE payload ->> 'event_id' = %s",
                    (Jsonb(history[wrong]), history[wrong]["event_id"]),
                )
                db.execute("CALL spectrum.process_batch()")
            elif action == "some":
                db.execute("SELECT spectrum._refresh_some(5)")
            elif action == "refresh":
                db.execute("CALL spectrum.refresh_analytics()")
            elif action == "define":
                experiment = any_experiment()
                define(db, experiment)
        db.execute("CALL spectrum.refresh_analytics()")
        accounts = [
            account for account in ("a0", "a1")
            if any(units_of(of_account(read_events(history), account), experiment))
        ]  # fmt: skip
        standing = ask(db, "SELECT * FROM analytics.experiment_results")
        assert_same(standing, expected_of(history, experiment, [None, *accounts]))


def test_a_result_that_is_replaced_stays_as_it_was(db: psycopg.Connection) -> None:
    """Until the new one is built, the results of an experiment follow the old definition."""
    define(db, Experiment("e", EVEN, "control", [Metric("m", "proportion", "click")]))
    load(db, [seen(f"u{n}", "control") for n in range(300)])
    db.execute("CALL spectrum.refresh_analytics()")
    define(db, Experiment("e", EVEN, "control", [Metric("m", "mean", "view")]))
    load(db, [happening("click", "u7", timedelta()), happening("view", "u8", timedelta())] * 2)
    query = (
        "SELECT kind, units, conversions, value FROM analytics.experiment_results"
        " WHERE is_control AND account_id = '*'"
    )
    assert db.execute(query).fetchall() == [("proportion", 300, 0, 0.0)]
    db.execute("SELECT spectrum._refresh_some(1)")
    assert db.execute(query).fetchall() == [("proportion", 300, 1, pytest.approx(1 / 300))]
    db.execute("CALL spectrum.refresh_analytics()")
    assert db.execute(query).fetchall() == [("mean", 300, 1, pytest.approx(2 / 300))]


def crowd(seed: int, arms: Sequence[str]) -> list[Payload]:
    """Some hundred users of an experiment, each with a taste for buying of his own."""
    pick = random.Random(seed)
    history: list[Payload] = []

    def happens(user: int, event_type: str, after: timedelta, **properties: object) -> None:
        history.append({
            "event_type": event_type, "user_id": f"user {user}", "account_id": f"a{user % 3}",
            "occurred_at": (START + after).isoformat(), "properties": properties,
        })  # fmt: skip

    for user in range(600):
        arm, taste = pick.choice(arms), pick.uniform(0.2, 2)
        at = timedelta(minutes=pick.randrange(20000))
        happens(user, "experiment_exposure", at, experiment="big", variant=arm)
        if pick.random() < 0.02:
            happens(user, "experiment_exposure", at, experiment="big", variant=pick.choice(arms))
        for _ in range(pick.randrange(6)):
            after = timedelta(minutes=pick.randrange(-3000, 20000))
            happens(user, "visit", at + after, plan=pick.choice(["free", "pro"]))
        for _ in range(max(0, pick.randrange(-3, 2 + arms.index(arm)))):
            amount = round(taste * pick.lognormvariate(3, 1) - 10, 2)
            after = timedelta(minutes=pick.randrange(-6000, 9000))
            happens(user, "purchase", at + after, amount=amount)
    pick.shuffle(history)
    return history


@pytest.mark.parametrize(
    ("seed", "arms", "chosen"),
    [
        (1, ["control", "treatment"], {}),
        (2, ["control", "b", "c", "d"], {"correction": "benjamini_hochberg", "confidence": 0.99}),
        (3, ["control", "b", "c"], {"confidence": 0.8}),
        (4, ["control", "treatment"], {"winsorize": 0.95}),
        (5, ["control", "b", "c"], {"cuped": timedelta(days=4)}),
        (6, ["control", "treatment"], {"sequential": 500}),
        (7, ["control", "b", "c"], {
            "winsorize": 0.98, "cuped": timedelta(days=2), "sequential": 5000, "confidence": 0.9,
        }),
    ],
)  # fmt: skip
def test_statistics(
    db: psycopg.Connection, seed: int, arms: list[str], chosen: Mapping[str, Any]
) -> None:
    history = crowd(seed, arms)
    experiment = Experiment(
        "big", dict.fromkeys(arms, 1), "control",
        [*METRICS[:-1], Metric("watched", "mean", "visit", is_guardrail=True)], **chosen,
    )  # fmt: skip
    load(db, history)
    define(db, experiment)
    expected = expected_of(history, experiment, [None])
    answer = ask(db, "SELECT * FROM analytics.experiment('big')")
    assert_same(answer, expected)
    assert any(row["is_reliable"] for row in answer.values())
    assert all(
        (row["p_adjusted"] is None) == (row["is_control"] or metric == "watched")
        for (_, metric, _), row in answer.items()
    )
    db.execute("CALL spectrum.refresh_analytics()")
    standing = ask(db, "SELECT * FROM analytics.experiment_results")
    assert_same(standing, expected_of(history, experiment, [None, "a0", "a1", "a2"]))


def test_methods_are_asked_for_or_defined(db: psycopg.Connection) -> None:
    """What is defined can be switched off by a question, what is not can be asked for."""
    history = crowd(8, ["control", "treatment"])
    load(db, history)
    chosen = {"winsorize": 0.9, "cuped": timedelta(days=3), "sequential": 800}
    plain = Experiment("big", EVEN, "control", METRICS)
    define(db, plain)
    query = "SELECT * FROM analytics.experiment('big', p_winsorize => %s, p_cuped => %s,"
    query += " p_sequential => %s)"
    expected = expected_of(history, replace(plain, **chosen), [None])
    assert_same(ask(db, query, *chosen.values()), expected)
    assert_same(ask(db, query, None, None, None), expected_of(history, plain, [None]))
    define(db, replace(plain, **chosen))
    assert_same(ask(db, query, None, None, None), expected)
    assert_same(ask(db, query, 1, timedelta(), 0), expected_of(history, plain, [None]))


def test_of_some_users_only(db: psycopg.Connection) -> None:
    """What a unit contributes does not depend on who else is asked about."""
    load(db, crowd(9, ["control", "treatment"]))
    define(db, Experiment("big", EVEN, "control", METRICS, cuped=timedelta(days=3)))
    query = (
        "SELECT c FROM analytics._experiment_plan('big') AS p, LATERAL (SELECT to_jsonb(c)"
        " FROM analytics._experiment_contributions(p, NULL, %s, %s) AS c) AS c (c) {}"
        " ORDER BY c"
    )
    users = db.execute("SELECT array_agg(user_key) FROM analytics.events").fetchone()[0][::40]
    for by_account in (False, True):
        some = db.execute(query.format(""), (by_account, users)).fetchall()
        of_all = query.format("WHERE (c ->> 'user_key')::bigint = ANY (%s)")
        assert some == db.execute(of_all, (by_account, None, users)).fetchall()
        assert len(some) > len(set(users))


def test_cookie_cats(db: psycopg.Connection) -> None:
    """The published counts of the Cookie Cats experiment, made again one event a player."""
    db.execute(
        "INSERT INTO raw_events (payload) SELECT jsonb_build_object("
        " 'event_type', 'experiment_exposure', 'occurred_at', '2024-05-01T00:00:00Z',"
        " 'user_id', variant || player, 'properties', jsonb_build_object("
        " 'experiment', 'gates', 'variant', variant, 'day_1', player <= day_1,"
        " 'day_7', player <= day_7))"
        " FROM (VALUES ('gate_30', 44700, 20034, 8502), ('gate_40', 45489, 20119, 8279))"
        " AS arms (variant, players, day_1, day_7), generate_series(1, players) AS player"
    )
    db.execute("CALL spectrum.process_batch(100000)")
    for day in ("day_1", "day_7"):
        db.execute(
            "SELECT spectrum.define_metric(%s, 'proportion', 'experiment_exposure', p_where => %s)",
            (f"retention_{day}", Jsonb({day: True})),
        )
    db.execute(
        "SELECT spectrum.define_experiment('gates', %s, 'gate_30', %s)",
        (Jsonb({"gate_30": 0.5, "gate_40": 0.5}), Jsonb(["retention_day_1", "retention_day_7"])),
    )
    rows = db.execute(
        "SELECT metric, conversions, units, p_value, p_adjusted, srm_p_value, is_reliable"
        " FROM analytics.experiment('gates') WHERE NOT is_control ORDER BY metric"
    ).fetchall()
    assert [row[:3] for row in rows] == [
        ("retention_day_1", 20119, 45489), ("retention_day_7", 8279, 45489),
    ]  # fmt: skip
    assert rows[0][3] == pytest.approx(0.07441, abs=5e-6)
    assert rows[1][3] == pytest.approx(0.001554, abs=5e-7)
    assert rows[0][4] == pytest.approx(rows[0][3])
    assert rows[1][4] == pytest.approx(2 * rows[1][3])
    for row in rows:
        assert row[5] == pytest.approx(0.008608, abs=5e-7)
        assert row[6] is True
