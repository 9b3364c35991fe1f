"""What can be said of the installed objects without running them: plpgsql_check, comments."""

from __future__ import annotations

import psycopg
import pytest
from conftest import need_extension

SCHEMAS = ["spectrum", "warehouse", "analytics"]
# An assignment between two integer types; the hint is meant for hot loops, and there is none.
HARMLESS = "target type is different type than source type"

# A trigger function is checked with the table that it serves.
FINDINGS = """
    SELECT routine.oid::regprocedure::text AS name, issue.level, issue.lineno, issue.message
    FROM pg_proc AS routine
    JOIN pg_language AS language ON language.oid = routine.prolang AND language.lanname = 'plpgsql'
    LEFT JOIN pg_trigger AS used ON used.tgfoid = routine.oid AND NOT used.tgisinternal
    CROSS JOIN LATERAL plpgsql_check_function_tb(
        routine.oid,
        relid => coalesce(used.tgrelid, 0),
        oldtable => used.tgoldtable,
        newtable => used.tgnewtable,
        performance_warnings => true
    ) AS issue
    WHERE routine.pronamespace::regnamespace::text = ANY (%(schemas)s)
        AND (routine.prorettype <> 'trigger'::regtype OR used.oid IS NOT NULL)
        AND NOT (issue.level = 'performance' AND issue.message = %(harmless)s)
        -- Only a volatile function may lock rows or drop tables, which the check does not see.
        AND NOT (issue.message = 'routine is marked as VOLATILE, should be STABLE'
            AND routine.prosrc ~ 'FOR (KEY SHARE|UPDATE)|DROP TABLE')
        -- What the users of a period are is called so everywhere; it is quoted.
        AND NOT (issue.message = 'name of parameter "returning" is reserved keyword'
            AND routine.proname IN ('lifecycle', '_lifecycle', '_standing_lifecycle_periods'))
        -- They return what a query written as text returns, which the check does not see.
        AND NOT (issue.message LIKE 'OUT variable %% is maybe unmodified'
            AND routine.prosrc ~ 'RETURN QUERY EXECUTE')
        -- Our own refusals: constant arguments make the check evaluate the call.
        AND NOT (issue.sqlstate = '22023' AND issue.message LIKE 'invalid value for argument %%')
    ORDER BY name, issue.lineno
"""
UNUSED_TRIGGER_FUNCTIONS = """
    SELECT oid::regprocedure::text FROM pg_proc
    WHERE prorettype = 'trigger'::regtype
        AND pronamespace::regnamespace::text = ANY (%(schemas)s)
        AND oid NOT IN (SELECT tgfoid FROM pg_trigger)
"""
SILENT_OBJECTS = """
    SELECT oid::regprocedure::text FROM pg_proc
    WHERE pronamespace::regnamespace::text = ANY (%(schemas)s)
        AND obj_description(oid, 'pg_proc') IS NULL
    UNION ALL
    SELECT oid::regclass::text FROM pg_class
    WHERE (relnamespace::regnamespace::text = ANY (%(schemas)s) OR relname = 'raw_events')
        AND relkind IN ('r', 'p', 'v', 'm') AND NOT relispartition
        AND obj_description(oid, 'pg_class') IS NULL
    UNION ALL
    SELECT nspname FROM pg_namespace
    WHERE nspname = ANY (%(schemas)s) AND obj_description(oid, 'pg_namespace') IS NULL
"""


def found(db: psycopg.Connection, query: str) -> str:
    parameters = {"schemas": SCHEMAS, "harmless": HARMLESS}
    return "\n".join(str(row) for row in db.execute(query, parameters))


# Some routines read pg_cron's tables, others temporary ones of a batch, a refresh or an
# erasure: they have to be there, and are after one of each kind of report was kept.
@pytest.fixture
def checked_db(cron_db: psycopg.Connection) -> psycopg.Connection:
    need_extension("plpgsql_check")
    cron_db.execute("CREATE EXTENSION plpgsql_check")
    cron_db.execute("""
        INSERT INTO raw_events (payload) VALUES
            ('{"event_type": "checked", "user_id": "u", "account_id": "a"}'),
            ('{"event_type": "experiment_exposure", "user_id": "u", "account_id": "a",
               "properties": {"experiment": "checked", "variant": "a"}}')
    """)
    cron_db.execute("""SELECT spectrum.define_funnel('checked', '["checked"]')""")
    cron_db.execute("SELECT spectrum.define_retention('checked', 'checked', 'checked')")
    cron_db.execute("""SELECT spectrum.define_attribution('checked', '"checked"')""")
    cron_db.execute("SELECT spectrum.define_paths('checked')")
    cron_db.execute("SELECT spectrum.define_metric('checked', 'proportion', 'checked')")
    cron_db.execute(
        """SELECT spectrum.define_experiment('checked', '{"a": 1, "b": 1}', 'a', '["checked"]')"""
    )
    cron_db.execute("""
        CREATE FUNCTION public.checked(p_users bigint[])
        RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
        LANGUAGE sql STABLE AS $$ SELECT '*', unnest(p_users), '{}'::text[], 1.0 $$
    """)
    cron_db.execute("SELECT spectrum.define_report('checked', 'public.checked')")
    cron_db.execute("CALL spectrum.process_batch()")
    cron_db.execute("CALL spectrum.refresh_analytics()")
    cron_db.execute("CALL spectrum.reprocess(p_status => 'done')")
    cron_db.execute("CALL spectrum.process_batch()")
    cron_db.execute("CALL spectrum.refresh_analytics()")
    cron_db.execute("SELECT spectrum.forget_user('nobody')")
    return cron_db


def test_plpgsql_check_finds_nothing(checked_db: psycopg.Connection) -> None:
    assert found(checked_db, FINDINGS) == ""


def test_plpgsql_check_would_find_something(checked_db: psycopg.Connection) -> None:
    checked_db.execute("""
        CREATE FUNCTION spectrum.wrong() RETURNS void LANGUAGE plpgsql
        AS 'BEGIN PERFORM no_such_column FROM spectrum.config; END'
    """)
    assert "no_such_column" in found(checked_db, FINDINGS)


def test_every_trigger_function_has_a_trigger(db: psycopg.Connection) -> None:
    assert found(db, UNUSED_TRIGGER_FUNCTIONS) == ""


def test_every_object_has_a_comment(db: psycopg.Connection) -> None:
    assert found(db, SILENT_OBJECTS) == ""
