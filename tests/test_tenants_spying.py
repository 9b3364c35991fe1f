"""What a tenant can do to make a database tell more than it shows: functions of his own in WHERE,
errors, plans, statistics, shadowed names, other settings, views that others made.
"""

from __future__ import annotations

import re

import psycopg
import pytest
from pipeline import rows, value
from psycopg import errors
from tenancy import (
    CLOSED,
    OF_ALL,
    OF_THE_PRODUCT,
    OTHER,
    OTHER_EVENTS,
    OWN,
    OWN_EVENTS,
    QUESTIONS,
    Party,
    marked,
    question,
    shown,
    views,
)


@pytest.fixture
def spy(party: Party, tenant: psycopg.Connection) -> psycopg.Connection:
    """The tenant with a schema of his own, and cheap functions in it that tell all they see."""
    name = value(tenant, "SELECT current_user")
    party.give_schema("spy", name)
    tenant.execute(
        """
        CREATE FUNCTION spy.tell(p_text text) RETURNS boolean LANGUAGE plpgsql COST 0.0001
        AS $$ BEGIN RAISE NOTICE '%', p_text; RETURN true; END $$;
        CREATE FUNCTION spy.differs(text, text) RETURNS boolean LANGUAGE plpgsql COST 0.0001
        AS $$ BEGIN RAISE NOTICE '%', $1; RETURN true; END $$;
        CREATE OPERATOR spy.<<>> (LEFTARG = text, RIGHTARG = text, FUNCTION = spy.differs);
        """
    )
    return tenant


def overheard(spy: psycopg.Connection, query: str) -> list[str]:
    """What notices and errors tell while the query runs."""
    told: list[str] = []

    def listen(diagnostic: psycopg.errors.Diagnostic) -> None:
        told.append(str(diagnostic.message_primary))

    spy.add_notice_handler(listen)
    try:
        spy.execute(query)
    except psycopg.Error as error:
        told += [str(error), str(error.diag.message_detail), str(error.diag.context)]
    finally:
        spy.remove_notice_handler(listen)
    return told


def text_columns(db: psycopg.Connection, view: str) -> list[str]:
    found = rows(
        db,
        "SELECT quote_ident(attname) FROM pg_attribute"
        " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
        f"analytics.{view}",
    )
    return [name for (name,) in found]


def spy_on(spy: psycopg.Connection, view: str) -> list[str]:
    """All that leaky functions, operators, casts and errors in WHERE tell of a view."""
    told = overheard(spy, f"SELECT FROM analytics.{view} AS a WHERE spy.tell(a::text)")
    for column in text_columns(spy, view):
        text = f"a.{column}::text"
        for condition in (
            f"spy.tell({text}) AND {text} OPERATOR(spy.<<>>) 'x'",
            f"({text})::inet IS NULL",
            f"1 / (CASE WHEN strpos({text}, 'zz_') > 0 THEN 0 ELSE 1 END) = 2 AND false",
        ):
            told += overheard(spy, f"SELECT FROM analytics.{view} AS a WHERE {condition}")
    return told


def test_leaky_functions_and_errors_tell_nothing(spy: psycopg.Connection) -> None:
    heard = 0
    for view in set(views(spy)) - CLOSED:
        told = spy_on(spy, view)
        assert marked(told) == [], view
        assert not any("division by zero" in text for text in told), view
        heard += len(told)
    assert heard > 1000, "the functions in WHERE did not run, so this shows nothing"
    for template in QUESTIONS:
        told = overheard(spy, f"SELECT FROM {question(template)} AS a WHERE spy.tell(a::text)")
        assert told and marked(told) == [], template


def test_a_view_without_its_filter_would_be_found(party: Party, spy: psycopg.Connection) -> None:
    """The tests above see each view that lost its condition, and the events that lost theirs."""
    filtered = 0
    for view in sorted(set(views(party.owner)) - CLOSED - OF_THE_PRODUCT):
        body = value(party.owner, f"SELECT pg_get_viewdef('analytics.{view}'::regclass)")
        open_body = re.sub(r"\( ?SELECT caller\.sees_all\s+FROM warehouse\.caller\)", "true", body)
        if open_body == body:
            continue
        filtered += 1
        options = "(security_barrier)"
        party.owner.execute(
            f"CREATE OR REPLACE VIEW analytics.{view} WITH {options} AS {open_body}"
        )
        seen = shown(spy, f"analytics.{view}")
        assert marked(seen) or (view in OF_ALL and seen), view
        party.owner.execute(f"CREATE OR REPLACE VIEW analytics.{view} WITH {options} AS {body}")
        assert marked(shown(spy, f"analytics.{view}")) == []
    assert filtered >= 20
    # Without the barrier the rows are right, and leaky functions see the others'.
    party.owner.execute("ALTER VIEW analytics.daily_events SET (security_barrier = false)")
    assert marked(spy_on(spy, "daily_events"))
    party.owner.execute("ALTER VIEW analytics.daily_events SET (security_barrier)")
    for view in ("events", "event_keys", "timelines"):
        assert marked(spy_on(spy, view)) == []
    party.owner.execute("ALTER TABLE warehouse.fact_events DISABLE ROW LEVEL SECURITY")
    for view in ("events", "event_keys", "timelines"):
        assert marked(shown(spy, f"analytics.{view}"))
    party.owner.execute("ALTER TABLE warehouse.fact_events ENABLE ROW LEVEL SECURITY")


def test_plans_and_statistics_name_nobody(party: Party, spy: psycopg.Connection) -> None:
    """They tell how many rows there are of all; docs/security.md says so. Never what is in them."""
    party.owner.execute("ANALYZE")
    for view in set(views(spy)) - CLOSED:
        plan = rows(spy, f"EXPLAIN (ANALYZE, VERBOSE, BUFFERS) SELECT * FROM analytics.{view}")
        assert marked([line for (line,) in plan]) == [], view
    for catalogue in ("pg_stats", "pg_stats_ext", "pg_stat_activity", "pg_sequences"):
        kept = rows(spy, f"SELECT c::text FROM {catalogue} AS c")
        # Of the server's own tables fractions are kept, of any digits: 4 of 4,050 is 0.000987654.
        ours = [line for (line,) in kept if "pg_temp" not in line and "(pg_catalog," not in line]
        assert marked(ours) == [], catalogue
    # Where everybody could read them, they would be there.
    assert marked([line for (line,) in rows(party.owner, "SELECT s::text FROM pg_stats AS s")])
    for call in (
        "lastval()", "currval('warehouse.dim_users_user_key_seq')",
        "pg_sequence_last_value('warehouse.dim_users_user_key_seq')",
        "table_to_xml('warehouse.dim_users', true, true, '')",
        "query_to_xml('SELECT * FROM warehouse.dim_users', true, true, '')",
        "pg_read_file('PG_VERSION')",
    ):  # fmt: skip
        with pytest.raises(psycopg.Error) as refused:
            spy.execute(f"SELECT {call}")
        assert refused.value.sqlstate in ("42501", "55000"), call


def test_shadowed_names_open_nothing(spy: psycopg.Connection) -> None:
    """The views name what they mean; the functions look nowhere else."""
    spy.execute(
        """
        CREATE FUNCTION spy.has_table_privilege(oid, text) RETURNS boolean LANGUAGE sql
        AS 'SELECT true';
        CREATE FUNCTION spy.has_table_privilege(regclass, text) RETURNS boolean LANGUAGE sql
        AS 'SELECT true';
        CREATE FUNCTION spy.pg_has_role(oid, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
        CREATE FUNCTION spy."current_user"() RETURNS name LANGUAGE sql AS $$ SELECT 'postgres' $$;
        CREATE FUNCTION spy.yes(bigint, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true';
        CREATE OPERATOR spy.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = spy.yes);
        CREATE TEMP TABLE caller AS SELECT true AS sees_all;
        CREATE TEMP TABLE tenants AS SELECT 'zz_other' AS account_id;
        CREATE TEMP TABLE own_accounts AS SELECT 'zz_other' AS account_id;
        CREATE TEMP VIEW all_accounts AS SELECT 'zz_other' AS account_id;
        """
    )
    for path in ("spy, pg_catalog", "pg_temp, spy, pg_catalog, analytics, warehouse"):
        spy.execute(f"SET search_path = {path}")
        for view in set(views(spy)) - CLOSED:
            assert marked(shown(spy, f"analytics.{view}")) == [], view
        for template in QUESTIONS:
            assert marked(shown(spy, question(template))) == [], template


@pytest.mark.parametrize(
    "settings",
    [
        "SET spectrum.from_facts = on",
        "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;"
        " SET min_parallel_table_scan_size = 0; SET min_parallel_index_scan_size = 0",
        "SET plan_cache_mode = force_generic_plan",
        "SET jit = off; SET enable_seqscan = off; SET enable_hashjoin = off",
        "SET constraint_exclusion = on; SET enable_partition_pruning = off",
        "SET jit = on; SET jit_above_cost = 0",
        "SET default_transaction_isolation = 'serializable'",
    ],
)
def test_no_setting_opens_anything(tenant: psycopg.Connection, settings: str) -> None:
    for statement in settings.split(";"):
        tenant.execute(statement)
    for view in ("events", "timelines", "daily_events", "active_users", "event_types", "accounts"):
        seen = shown(tenant, f"analytics.{view}")
        assert seen and marked(seen) == [], view
    assert value(tenant, "SELECT sum(value) FROM analytics.trend()") == len(OWN_EVENTS)


def test_no_way_past_the_policies(tenant: psycopg.Connection) -> None:
    tenant.execute("SET row_security = off")
    with pytest.raises(errors.InsufficientPrivilege):
        tenant.execute("SELECT * FROM analytics.events")
    tenant.execute("SET row_security = on")
    for statement in (
        "SET ROLE postgres",
        "SET SESSION AUTHORIZATION postgres",
        "SELECT * FROM warehouse.fact_events",
        "SELECT * FROM analytics.mv_daily_events",
        "SELECT * FROM analytics.all_accounts",
        "SELECT * FROM spectrum.tenants",
        "INSERT INTO spectrum.tenants VALUES (current_user, 'zz_other')",
        "INSERT INTO analytics.events (user_key) VALUES (1)",
        "UPDATE analytics.accounts SET account_id = 'acme'",
        "DELETE FROM analytics.settings",
        "ALTER VIEW analytics.events SET (security_barrier = false)",
        "CREATE OR REPLACE VIEW analytics.events AS SELECT 1",
        "ALTER TABLE warehouse.fact_events DISABLE ROW LEVEL SECURITY",
        "DROP POLICY own_accounts ON warehouse.fact_events",
        "SELECT spectrum.grant_tenant(current_user::regrole, 'zz_other')",
        "SELECT spectrum.grant_analyst(current_user::regrole)",
    ):
        with pytest.raises(psycopg.Error) as refused:
            tenant.execute(statement)
        assert refused.value.sqlstate in ("42501", "55000"), statement
    with tenant.cursor().copy("COPY (SELECT e::text FROM analytics.events AS e) TO STDOUT") as copy:
        lines = [bytes(line).decode() for line in copy]
    assert lines and marked(lines) == []


def test_plans_kept_in_a_session_follow_its_role(party: Party) -> None:
    """One log-in that may become an analyst of all and a tenant, in turn."""
    tenant, _ = party.role(f"grant_tenant({{}}, '{OWN}')")
    analyst, _ = party.role("grant_analyst({})")
    login, session = party.role()
    with party.superuser() as admin:
        admin.execute(f'ALTER ROLE "{login}" NOINHERIT')
        admin.execute(f'GRANT "{tenant}", "{analyst}" TO "{login}"')
    queries = (
        "SELECT count(*) FROM analytics.events",
        "SELECT sum(value)::bigint FROM analytics.trend()",
        "SELECT count(DISTINCT account_id) FROM analytics.daily_events",
        "SELECT count(*) FROM analytics.accounts",
    )
    everything = [value(party.owner, query) for query in queries]
    session.execute(f'SET ROLE "{analyst}"')
    for number, query in enumerate(queries):
        session.execute(f"PREPARE q{number} AS {query}")

    def answers() -> list[int]:
        return [value(session, f"EXECUTE q{number}") for number in range(len(queries))]

    own = [len(OWN_EVENTS), len(OWN_EVENTS), 1, 1]
    for _ in range(7):  # from the sixth on with a plan that is kept
        assert answers() == everything
    for _ in range(7):
        session.execute(f'SET ROLE "{tenant}"')
        assert answers() == own
        session.execute(f'SET ROLE "{analyst}"')
        assert answers() == everything
    session.execute("RESET ROLE")
    with pytest.raises(errors.InsufficientPrivilege):
        answers()


def test_views_that_others_made(party: Party) -> None:
    """A view over Spectrum's shows what its reader may see, whoever made it."""
    analyst, analysts = party.role("grant_analyst({})")
    tenant, tenants = party.role(f"grant_tenant({{}}, '{OWN}')")
    _, others = party.role(f"grant_tenant({{}}, '{OTHER}')")
    _, nobodys = party.role()
    for name, db, schema in ((analyst, analysts, "ana"), (tenant, tenants, "ten")):
        party.give_schema(schema, name)
        db.execute(f"CREATE VIEW {schema}.kept AS SELECT * FROM analytics.events")
        db.execute(f"CREATE VIEW {schema}.cells AS SELECT * FROM analytics.daily_events")
        db.execute(f"GRANT USAGE ON SCHEMA {schema} TO PUBLIC")
        db.execute(f"GRANT SELECT ON {schema}.kept, {schema}.cells TO PUBLIC")
    for schema in ("ana", "ten"):
        assert shown(nobodys, f"{schema}.cells") == []
        with pytest.raises(errors.InsufficientPrivilege):
            shown(nobodys, f"{schema}.kept")
        assert len(shown(tenants, f"{schema}.kept")) == len(OWN_EVENTS)
        assert len(shown(others, f"{schema}.kept")) == len(OTHER_EVENTS)
        for view in ("kept", "cells"):
            assert marked(shown(tenants, f"{schema}.{view}")) == []
            assert marked(shown(analysts, f"{schema}.{view}"))
