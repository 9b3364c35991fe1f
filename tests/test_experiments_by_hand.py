"""Experiments: who is a unit, what counts, what is reliable, what is refused; by hand."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import psycopg
import pytest
from experiments import EVEN, START, define, happening, seen
from histories import load
from oracle_experiments import Experiment, Metric


def counts(db: psycopg.Connection, *arguments: object) -> dict[str, tuple[int, int, int]]:
    query = (
        "SELECT variant, units, excluded_units, conversions FROM analytics.experiment('e', "
        "p_from => %s, p_to => %s)"
    )
    rows = db.execute(query, arguments or (None, None)).fetchall()
    return {variant: tuple(row) for variant, *row in rows}


def test_who_is_a_unit(db: psycopg.Connection) -> None:
    define(db, Experiment("e", EVEN, "control", [Metric("m", "proportion", "click")]))
    assert counts(db) == {"control": (0, 0, 0), "treatment": (0, 0, 0)}
    flag = {"$feature_flag": "e", "$feature_flag_response": "treatment"}
    hour = timedelta(hours=1)
    load(db, [
        seen("twice", "control"), seen("twice", "control", hour),
        seen("both", "control"), seen("both", "treatment", hour),
        seen("planned and not", "control"), seen("planned and not", "beta", hour),
        seen("not planned", "beta"), seen("no variant", None), seen("empty", ""),
        happening("$feature_flag_called", "flagged", hour, **flag),
        happening("experiment_exposure", "elsewhere", hour, experiment="f", variant="control"),
        {**seen("", "control"), "user_id": None},
    ])  # fmt: skip
    assert counts(db) == {"control": (1, 3, 0), "treatment": (1, 3, 0)}
    # Before the second exposure, nothing was seen twice; after the first, nothing else was seen.
    assert counts(db, None, START + hour) == {"control": (3, 1, 0), "treatment": (0, 1, 0)}
    assert counts(db, START + hour, None) == {"control": (1, 1, 0), "treatment": (2, 1, 0)}


def test_when_events_count(db: psycopg.Connection) -> None:
    second, day = timedelta(seconds=1), timedelta(days=1)
    users = {
        "before": -second, "at once": timedelta(), "in time": day - second, "late": day,
        "after the end": 3 * day,
    }  # fmt: skip
    # Being seen again changes nothing.
    load(db, [seen(user, "control", after) for user in users for after in (day / 2, 0 * day)])
    load(db, [happening("click", user, after) for user, after in users.items()])
    metrics = [Metric("any", "proportion", "click"),
               Metric("soon", "proportion", "click", window=day),
               Metric("one week", "proportion", "click", window=7 * day)]  # fmt: skip
    define(db, Experiment("e", EVEN, "control", metrics, end=START + 2 * day))
    rows = db.execute(
        "SELECT metric, conversions FROM analytics.experiment('e') WHERE is_control"
    ).fetchall()
    assert dict(rows) == {"any": 3, "soon": 2, "one week": 4}


@pytest.mark.parametrize(
    ("arms", "plan", "proportion", "mean"),
    [
        ({"control": (50, 5), "treatment": (50, 45)}, EVEN, [True, True], [True, True]),
        ({"control": (50, 5), "treatment": (49, 5)}, EVEN, [True, False], [True, False]),
        ({"control": (50, 4), "treatment": (60, 6)}, EVEN, [False, False], [False, False]),
        ({"control": (50, 5), "treatment": (50, 46)}, EVEN, [True, False], [True, True]),
        ({"control": (50, 20), "treatment": (100, 20)}, EVEN, [False, False], [False, False]),
        ({"control": (50, 20), "treatment": (100, 20)}, {"control": 1, "treatment": 2},
         [True, True], [True, True]),
    ],
)  # fmt: skip
def test_reliable_means_enough_of_both_arms(
    db: psycopg.Connection,
    arms: Mapping[str, tuple[int, int]],
    plan: Mapping[str, float],
    proportion: list[bool],
    mean: list[bool],
) -> None:
    load(db, [seen(f"{arm}{n}", arm) for arm, (units, _) in arms.items() for n in range(units)])
    load(db, [
        happening("click", f"{arm}{n}", timedelta())
        for arm, (_, clicks) in arms.items() for n in range(clicks)
    ])  # fmt: skip
    metrics = [Metric("p", "proportion", "click"), Metric("m", "mean", "click")]
    define(db, Experiment("e", plan, "control", metrics))
    rows = db.execute("SELECT is_reliable FROM analytics.experiment('e')").fetchall()
    assert [row[0] for row in rows] == [*proportion, *mean]


def test_amounts_that_are_extreme_or_no_numbers(db: psycopg.Connection) -> None:
    load(db, [seen(f"{arm}{n}", arm) for arm in EVEN for n in range(4)])
    db.execute(
        "INSERT INTO raw_events (payload) SELECT jsonb_build_object('event_type', 'buy',"
        " 'user_id', arm || n, 'occurred_at', '2024-05-02', 'properties', jsonb_build_object("
        " 'x', (ARRAY['1e400', '-1e131000', '1e-400', '999999999999999', '\"1e-90\"', '\"n/a\"',"
        " 'null'])[n + i]::jsonb)) FROM unnest(ARRAY['control', 'treatment']) AS arm,"
        " generate_series(0, 3) AS n, generate_series(1, 4) AS i"
    )
    db.execute("CALL spectrum.process_batch()")
    metrics = [
        Metric("mean", "mean", "buy", wanted="x"),
        Metric("ratio", "ratio", "buy", wanted="x", lower_event="buy", lower_wanted="x"),
    ]
    define(db, Experiment("e", EVEN, "control", metrics))
    rows = db.execute("SELECT conversions, is_reliable FROM analytics.experiment('e')").fetchall()
    assert rows == [(4, False)] * 4


ERRORS = {
    "define_metric('', 'mean', 'e')": "p_name",
    "define_metric('m', 'median', 'e')": "p_kind",
    "define_metric('m', 'mean', NULL)": "p_event",
    "define_metric('m', 'proportion', 'e', 'amount')": "p_property",
    "define_metric('m', 'mean', 'e', p_window => '-1 day')": "p_window",
    "define_metric('m', 'mean', 'e', p_where => '[]')": "p_where",
    "define_metric('m', 'ratio', 'e')": "p_denominator_event",
    "define_metric('m', 'mean', 'e', p_denominator_event => 'f')": "p_kind",
    "define_metric('m', 'mean', 'e', p_guardrail => NULL)": "p_guardrail",
    "drop_metric('unknown')": "p_name",
    "drop_metric('known')": "p_name",
    """define_experiment('', '{"a": 1, "b": 1}', 'a', '["known"]')""": "p_name",
    """define_experiment('x', '{"a": 1}', 'a', '["known"]')""": "p_variants",
    """define_experiment('x', '{"a": 1, "b": 0}', 'a', '["known"]')""": "p_variants",
    """define_experiment('x', '["a", "b"]', 'a', '["known"]')""": "p_variants",
    """define_experiment('x', NULL, 'a', '["known"]')""": "p_variants",
    """define_experiment('x', '{"a": 1, "b": 1}', 'c', '["known"]')""": "p_control",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '["unknown"]')""": "p_metrics",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '["known", "known"]')""": "p_metrics",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '[null]')""": "p_metrics",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '[]')""": "p_metrics",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '["known"]', p_confidence => 95)""":
        "p_confidence",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '["known"]', p_correction => 'none')""":
        "p_correction",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '["known"]', p_winsorize => 0.5)""":
        "p_winsorize",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '["known"]', p_cuped => '11 years')""":
        "p_cuped",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '["known"]', p_sequential => -1)""":
        "p_sequential",
    """define_experiment('x', '{"a": 1, "b": 1}', 'a', '["known"]', '2024-02-01', '2024-01-01')""":
        "p_to",
    "drop_experiment('unknown')": "p_name",
}  # fmt: skip


def test_wrong_arguments_are_named(db: psycopg.Connection) -> None:
    define(db, Experiment("e", EVEN, "control", [Metric("known", "proportion", "click")]))
    for call, named in ERRORS.items():
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=named) as caught:
            db.execute(f"SELECT spectrum.{call}")
        assert caught.value.diag.message_hint, call
    for arguments, named in {
        "'unknown'": "p_experiment",
        "NULL": "p_experiment",
        "'e', p_confidence => 0": "p_confidence",
        "'e', p_correction => 'bonferroni'": "p_correction",
        "'e', p_from => '2024-02-01', p_to => '2024-01-01'": "p_to",
        "'e', p_winsorize => 99": "p_winsorize",
        "'e', p_winsorize => 'NaN'": "p_winsorize",
        "'e', p_cuped => '-1 day'": "p_cuped",
        "'e', p_sequential => 1e13::bigint": "p_sequential",
    }.items():
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=named):
            db.execute(f"SELECT * FROM analytics.experiment({arguments})")


def test_definitions_are_replaced_and_dropped(db: psycopg.Connection) -> None:
    load(db, [seen("u", "control"), happening("click", "u", timedelta())])
    metric = Metric("m", "proportion", "click")
    define(db, Experiment("e", EVEN, "control", [metric]))
    db.execute("CALL spectrum.refresh_analytics()")
    query = "SELECT conversions FROM analytics.experiment_results WHERE is_control"
    assert db.execute(query).fetchall() == [(1,), (1,)]
    db.execute("SELECT spectrum.define_metric('m', 'proportion', 'never')")
    db.execute("CALL spectrum.refresh_analytics()")
    assert db.execute(query).fetchall() == [(0,), (0,)]
    db.execute("SELECT spectrum.drop_experiment('e')")
    db.execute("SELECT spectrum.drop_metric('m')")
    db.execute("CALL spectrum.refresh_analytics()")
    assert db.execute(query).fetchall() == []
