"""Experiments: units, windows and sums against an oracle, statistics against SciPy."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from histories import (
    Payload,
    epochs,
    exploring,
    instants,
    load,
    loaded,
    payloads,
    properties,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from oracle_events import read_events
from oracle_experiments import Experiment, Metric, results
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

START = datetime(2024, 5, 1, tzinfo=UTC)
EVEN = {"control": 0.5, "treatment": 0.5}


def define(db: psycopg.Connection, experiment: Experiment) -> None:
    for metric in experiment.metrics:
        db.execute(
            "SELECT spectrum.define_metric(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                metric.name, metric.kind, metric.event, metric.wanted, metric.window,
                metric.where and Jsonb(metric.where), metric.lower_event, metric.lower_wanted,
                metric.lower_where and Jsonb(metric.lower_where), metric.is_guardrail,
            ),
        )  # fmt: skip
    db.execute(
        "SELECT spectrum.define_experiment(%s, %s, %s, %s, %s, %s, %s, %s)",
        (
            experiment.name, Jsonb(experiment.variants), experiment.control,
            Jsonb([metric.name for metric in experiment.metrics]), experiment.start,
            experiment.end, experiment.confidence, experiment.correction,
        ),
    )  # fmt: skip


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
    "p_value", "p_adjusted", "srm_p_value", "is_reliable",
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
names = st.sampled_from(["exp", "exp", "exp", "exp", "other", None])
variants = st.sampled_from(
    ["control", "control", "treatment", "treatment", "unplanned", "", None, True, 1]
)
happenings = properties(
    experiment=names, variant=variants, amount=values, plan=st.sampled_from(["pro", "free"])
) | st.fixed_dictionaries(
    {"$feature_flag": names, "$feature_flag_response": variants, "experiment": names,
     "variant": variants, "plan": st.just("pro"), "amount": values}
)  # fmt: skip


@exploring
@given(data=st.data(), epoch=epochs, correction=st.sampled_from(["holm", "benjamini_hochberg"]))
def test_any_history(
    db: psycopg.Connection, data: st.DataObject, epoch: datetime, correction: str
) -> None:
    types = ["experiment_exposure", "experiment_exposure", "$feature_flag_called",
             "purchase", "visit"]  # fmt: skip
    history = data.draw(payloads(epoch, types, happenings))
    ends = st.one_of(st.none(), instants(epoch))
    start, end = data.draw(st.tuples(ends, ends).filter(lambda r: None in r or r[0] <= r[1]))
    plan = data.draw(st.sampled_from([EVEN, {"control": 1, "treatment": 2, "true": 3}]))
    experiment = Experiment(
        "exp", plan, "control", METRICS, start, end, confidence=0.9, correction=correction
    )
    with loaded(db, history):
        define(db, experiment)
        answer = ask(db, "SELECT * FROM analytics.experiment('exp')")
        assert_same(answer, expected_of(history, experiment, [None]))
        answer = ask(db, "SELECT * FROM analytics.experiment('exp', 'a1')")
        assert_same(answer, expected_of(history, experiment, ["a1"]))
        db.execute("REFRESH MATERIALIZED VIEW analytics.mv_experiment_results")
        standing = ask(db, "SELECT * FROM analytics.experiment_results")
        accounts = [None, *sorted({key[0] for key in standing} - {"*"})]
        assert_same(standing, expected_of(history, experiment, accounts))
