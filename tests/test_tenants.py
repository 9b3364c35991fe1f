"""A tenant sees what he would see if his account were alone in the database, and nothing else.

That is tried against every view and function of analytics found in the catalogue, so a new one
without the filter fails here; and by what a tenant can do to make a database tell more than it
shows: functions of his own in WHERE, errors, plans, statistics, shadowed names, other settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest
from conftest import OWNER, Connect, MakeDb, MakeRole, dsn_of, run_sql
from pipeline import insert, rows, value
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pytest_postgresql.executors.noop import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor
from tenancy import (
    NOBODYS,
    OTHER,
    OTHER_EVENTS,
    OWN,
    OWN_EVENTS,
    QUESTIONS,
    fill,
    marked,
    question,
    quoted,
    shown,
    views,
)

# Views that say nothing of any account, and are the same for all.
OF_THE_PRODUCT = {"settings", "features", "metrics", "experiments", "served_reports"}
# Views of all accounts together, where a tenant finds no row.
OF_ALL = {"pipeline", "pipeline_status", "user_days"}
# What a tenant may not even open.
CLOSED = {"all_accounts"}
NO_ACCOUNT = "never heard of"


def dsn_user() -> str:
    return str(conninfo_to_dict(dsn_of("postgres"))["user"])


class Party:
    """The database with both accounts, its owner, and roles that he grants."""

    def __init__(self, dsn: str, connect: Connect, make_role: MakeRole) -> None:
        self.dsn, self.connect, self.make_role = dsn, connect, make_role
        self.owner = connect(dsn)

    def give_schema(self, schema: str, role: str) -> None:
        """As a superuser: an owner who is none cannot give objects away."""
        admin = make_conninfo(self.dsn, user=dsn_user())
        run_sql(admin, f"DROP SCHEMA IF EXISTS {schema} CASCADE",
                f'CREATE SCHEMA {schema} AUTHORIZATION "{role}"')  # fmt: skip

    def role(self, *calls: str) -> tuple[str, psycopg.Connection]:
        """A new role, given what the calls give ("{}" is the role), and a session of it."""
        name = self.make_role("Odd tenant; --")
        for call in calls:
            self.owner.execute(f"SELECT spectrum.{call.format(quoted(name))}")
        return name, self.connect(make_conninfo(self.dsn, user=name))


@pytest.fixture(scope="module")
def crowd_dsn(tidy_server: None, owner_template: NoopExecutor) -> Iterator[str]:
    """DSN, as the owner, of the database with both accounts: no test here changes what is in it."""
    source = owner_template
    janitor = DatabaseJanitor(
        host=source.host,
        port=source.port,
        user=source.user,
        password=source.password,
        dbname="tests_crowd",
        template_dbname=source.template_dbname,
    )
    with janitor:
        run_sql(dsn_of("postgres"), f"ALTER DATABASE {janitor.dbname} OWNER TO {OWNER}")
        dsn = dsn_of(janitor.dbname, OWNER)
        with psycopg.connect(dsn, autocommit=True) as connection:
            fill(connection, OWN_EVENTS, OTHER_EVENTS, NOBODYS)
        yield dsn


@pytest.fixture
def party(crowd_dsn: str, connect: Connect, make_role: MakeRole) -> Party:
    return Party(crowd_dsn, connect, make_role)


@pytest.fixture
def tenant(party: Party) -> psycopg.Connection:
    return party.role(f"grant_tenant({{}}, '{OWN}')")[1]


@pytest.fixture
def alone(make_db: MakeDb, connect: Connect) -> psycopg.Connection:
    """His account alone in a database of its own, by its owner."""
    db = connect(make_db("alone", template="owner"))
    fill(db, OWN_EVENTS)
    return db


def where_own(db: psycopg.Connection, view: str) -> str:
    has_account = value(
        db,
        "SELECT count(*) FROM pg_attribute WHERE attrelid = %s::regclass"
        " AND attname = 'account_id'",
        f"analytics.{view}",
    )
    return f"answer.account_id = '{OWN}'" if has_account else "true"


def test_tenant_sees_what_his_account_alone_would_show(
    party: Party, tenant: psycopg.Connection, alone: psycopg.Connection
) -> None:
    for view in sorted(set(views(alone)) - CLOSED):
        seen = shown(tenant, f"analytics.{view}")
        expected = shown(alone, f"analytics.{view}", where_own(alone, view))
        if view in OF_ALL:
            assert seen == [], view
        elif view == "user_days_state":
            assert rows(tenant, "SELECT * FROM analytics.user_days_state") == [(False,)]
        else:
            assert expected, f"{view} is empty, so this shows nothing"
            assert seen == expected, view
            assert marked(seen) == [], view
            assert view in OF_THE_PRODUCT or marked(shown(party.owner, f"analytics.{view}")), (
                f"{view} tells nothing of the other account to anyone, so this shows nothing"
            )
    for template in QUESTIONS:
        asked = question(template)
        expected = shown(alone, asked)
        assert expected, f"{asked} is empty, so this shows nothing"
        assert shown(tenant, asked) == expected, asked
        assert shown(party.owner, asked) != expected, f"{asked}: the other account does not count"
        assert shown(tenant, question(template, OWN)) == shown(alone, question(template, OWN))


def test_every_function_is_asked(party: Party) -> None:
    asked = {re.split(r"[.(]", template)[1] for template in QUESTIONS} | {"trace"}
    found = rows(
        party.owner,
        "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'analytics'::regnamespace"
        " AND NOT starts_with(proname, '_')",
    )
    assert {name for (name,) in found} == asked


def test_another_account_is_an_unknown_account(tenant: psycopg.Connection) -> None:
    for template in QUESTIONS:
        of_other, of_nobody = (
            shown(tenant, question(template, account)) for account in (OTHER, NO_ACCOUNT)
        )
        assert [row.replace(OTHER, NO_ACCOUNT) for row in of_other] == of_nobody, template
    for view in set(views(tenant)) - CLOSED - OF_ALL - OF_THE_PRODUCT - {"user_days_state"}:
        if where_own(tenant, view) != "true":
            for scope in (OTHER, "*"):
                assert shown(tenant, f"analytics.{view}", f"account_id = '{scope}'") == []


def test_tenant_traces_his_own_cells(party: Party, tenant: psycopg.Connection) -> None:
    cells = rows(
        party.owner,
        "SELECT to_jsonb(cell) - '{as_of}'::text[] FROM analytics.active_users AS cell"
        " WHERE dau > 0 AND account_id = '*'",
    )
    assert cells
    told = 0
    for (cell,) in cells:
        for account in ("*", OWN, OTHER):
            asked = f"""analytics.trace('active_users', '{{"account_id": "{account}", "day": "{
                cell["day"]
            }"}}')"""
            traced = shown(tenant, asked)
            assert marked(traced) == ([] if account != OTHER else marked(traced))
            assert not any("zz_u" in row or "98765" in row for row in traced)
            told += len(traced) if account == OWN else 0
            assert account != OTHER or traced == []
    assert told
    with pytest.raises(errors.InsufficientPrivilege):
        shown(tenant, f"spectrum.explain_event('{OTHER_EVENTS[0]['event_id']}')")


def test_tenant_of_two_accounts_sees_both_and_no_sum(party: Party) -> None:
    name, both = party.role(
        f"grant_tenant({{}}, '{OWN}')", f"grant_tenant({{}}, '{OTHER}')",
        f"grant_tenant({{}}, '{OTHER}')",
    )  # fmt: skip
    for view in ("daily_events", "active_users", "revenue_summary", "event_catalog"):
        assert rows(both, f"SELECT DISTINCT account_id FROM analytics.{view} ORDER BY 1") == [
            (OWN,), (OTHER,)
        ]  # fmt: skip
    assert value(both, "SELECT sum(value) FROM analytics.trend()") == len(OWN_EVENTS + OTHER_EVENTS)
    assert value(both, "SELECT count(*) FROM analytics.events WHERE account_id IS NULL") == 0

    party.owner.execute(f"SELECT spectrum.revoke_tenant({quoted(name)}, '{OTHER}')")
    assert value(both, "SELECT sum(value) FROM analytics.trend()") == len(OWN_EVENTS)
    party.owner.execute(f"SELECT spectrum.revoke_tenant({quoted(name)})")
    for query in ("analytics.trend()", "analytics.daily_events", "analytics.events"):
        with pytest.raises(errors.InsufficientPrivilege):
            both.execute(f"SELECT * FROM {query}")


def test_tenant_as_reader_has_the_views_alone(party: Party) -> None:
    _, reader = party.role(f"grant_tenant({{}}, '{OWN}', 'reader')")
    assert value(reader, "SELECT count(DISTINCT account_id) FROM analytics.daily_events") == 1
    for query in ("analytics.trend()", "analytics.events", "analytics.user_days"):
        with pytest.raises(errors.InsufficientPrivilege):
            reader.execute(f"SELECT * FROM {query}")


def test_account_without_events(
    owner_db: psycopg.Connection, owner_dsn: str, connect: Connect, make_role: MakeRole
) -> None:
    """Granted before its first event: nothing, and from then on what came."""
    party = Party(owner_dsn, connect, make_role)
    _, early = party.role("grant_tenant({}, 'to come')")
    assert rows(early, "SELECT * FROM analytics.events") == []
    assert rows(early, "SELECT * FROM analytics.active_users") == []
    assert rows(early, "SELECT * FROM analytics.trend()") == []
    insert(party.owner, [OWN_EVENTS[1] | {"event_id": "first", "account_id": "to come"}])
    party.owner.execute("CALL spectrum.run()")
    assert value(early, "SELECT sum(value) FROM analytics.trend('visit')") == 1
    assert rows(early, "SELECT account_id FROM analytics.active_users WHERE dau > 0") == [
        ("to come",)
    ]


def test_without_a_grant_of_accounts_there_is_nothing(party: Party) -> None:
    """Whoever is given the views by hand, or keeps them, sees no account."""
    name, stray = party.role()
    role = f'"{name}"'
    for grant in (
        "USAGE ON SCHEMA analytics, spectrum", "EXECUTE ON ALL FUNCTIONS IN SCHEMA analytics",
        "SELECT ON ALL TABLES IN SCHEMA analytics", "SELECT ON ALL TABLES IN SCHEMA warehouse",
    ):  # fmt: skip
        party.owner.execute(f"GRANT {grant} TO {role}")
    party.owner.execute(f"REVOKE SELECT ON analytics.all_accounts FROM {role}")
    for view in set(views(party.owner)) - CLOSED - OF_THE_PRODUCT - {"user_days_state"}:
        assert shown(stray, f"analytics.{view}") == [], view
    # By hand is by hand: the tables beneath are not for roles.
    assert shown(stray, "analytics.mv_daily_events") != []


# What a tenant tries.


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
        assert marked([line for (line,) in kept if "pg_temp" not in line]) == [], catalogue
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
        "SET constraint_exclusion = on; SET enable_partition_pruning = off; SET jit = off",
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
    with psycopg.connect(make_conninfo(party.dsn, user=dsn_user()), autocommit=True) as admin:
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


# Who becomes a tenant, and who ceases to be one.


def test_grants_that_contradict_each_other_are_refused(party: Party) -> None:
    for kind in ("reader", "analyst"):
        name, _ = party.role(f"grant_{kind}({{}})")
        with pytest.raises(errors.ObjectNotInPrerequisiteState) as refused:
            party.owner.execute(f"SELECT spectrum.grant_tenant({quoted(name)}, '{OWN}')")
        assert refused.value.diag.message_primary.endswith("sees all accounts already")
        assert "SELECT spectrum.revoke_analyst(" in refused.value.diag.message_hint
        # The hint is what helps.
        party.owner.execute(re.search(r"SELECT .*;", refused.value.diag.message_hint)[0])
        party.owner.execute(f"SELECT spectrum.grant_tenant({quoted(name)}, '{OWN}')")
        with pytest.raises(errors.ObjectNotInPrerequisiteState) as refused:
            party.owner.execute(f"SELECT spectrum.grant_{kind}({quoted(name)})")
        assert refused.value.diag.message_primary.endswith("is a tenant")
        party.owner.execute(re.search(r"SELECT .*;", refused.value.diag.message_hint)[0])
        party.owner.execute(f"SELECT spectrum.grant_{kind}({quoted(name)})")
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        party.owner.execute("SELECT spectrum.grant_tenant(current_user::regrole, 'a')")


def test_what_ends_has_ended(party: Party) -> None:
    """No list of who sees all outlives what it was made of."""
    tenant, session = party.role(f"grant_tenant({{}}, '{OWN}')")
    group, _ = party.role("grant_analyst({})")
    count = "SELECT count(*) FROM analytics.events"
    with psycopg.connect(make_conninfo(party.dsn, user=dsn_user()), autocommit=True) as admin:
        admin.execute(f'GRANT "{group}" TO "{tenant}"')
        assert value(session, count) == value(party.owner, count)
        party.role("grant_analyst({})")  # the policies are looked after
        admin.execute(f'REVOKE "{group}" FROM "{tenant}"')
    assert value(session, count) == len(OWN_EVENTS)

    name, analyst = party.role("grant_analyst({})")
    assert value(analyst, count) == value(party.owner, count)
    party.owner.execute(f"SELECT spectrum.revoke_reader({quoted(name)})")
    with pytest.raises(errors.InsufficientPrivilege):
        value(analyst, count)
    party.owner.execute(f'GRANT USAGE ON SCHEMA analytics TO "{name}"')
    assert value(analyst, count) == 0
    party.owner.execute(f"SELECT spectrum.grant_analyst({quoted(name)})")
    assert value(analyst, count) == value(party.owner, count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("NULL, 'a'", "invalid value for argument p_role: NULL"),
        ("current_user::regrole, NULL", "invalid value for argument p_account: NULL"),
        ("current_user::regrole, '*'", 'invalid value for argument p_account: "*"'),
        ("current_user::regrole, ''", 'invalid value for argument p_account: ""'),
        ("current_user::regrole, 'a', 'owner'", 'invalid value for argument p_as: "owner"'),
    ],
)
def test_arguments_of_grant_tenant(party: Party, arguments: str, message: str) -> None:
    with pytest.raises(errors.InvalidParameterValue) as refused:
        party.owner.execute(f"SELECT spectrum.grant_tenant({arguments})")
    assert refused.value.diag.message_primary == message
    with pytest.raises(errors.InvalidParameterValue):
        party.owner.execute("SELECT spectrum.revoke_tenant(NULL)")


def test_a_later_role_of_the_same_name_inherits_nothing(party: Party) -> None:
    name, _ = party.role(f"grant_tenant({{}}, '{OTHER}')")
    with psycopg.connect(make_conninfo(party.dsn, user=dsn_user()), autocommit=True) as admin:
        with pytest.raises(errors.DependentObjectsStillExist):
            admin.execute(f'DROP ROLE "{name}"')
        admin.execute(f'DROP OWNED BY "{name}"')
        admin.execute(f'DROP ROLE "{name}"')
        admin.execute(f'CREATE ROLE "{name}" LOGIN')
    again = party.connect(make_conninfo(party.dsn, user=name))
    # What is left of the former one does not count, and goes with the next grant.
    party.owner.execute(f'GRANT USAGE ON SCHEMA analytics TO "{name}"')
    party.owner.execute(f'GRANT SELECT ON analytics.accounts TO "{name}"')
    assert rows(again, "SELECT account_id FROM analytics.accounts") == []
    party.owner.execute(f"SELECT spectrum.grant_tenant({quoted(name)}, '{OWN}')")
    assert rows(again, "SELECT account_id FROM analytics.accounts") == [(OWN,)]
    assert rows(
        party.owner, "SELECT account_id FROM spectrum.tenants WHERE role_name = %s", name
    ) == [(OWN,)]  # fmt: skip


def test_who_sees_all_has_the_plans_of_the_owner(party: Party) -> None:
    """The policy costs an analyst of all accounts nothing: there is none in his plans."""
    _, analyst = party.role("grant_analyst({})")
    party.role(f"grant_tenant({{}}, '{OWN}')")
    for query in (
        "SELECT user_key, count(*) FROM analytics.event_keys WHERE event_type_key = 1 GROUP BY 1",
        "SELECT user_key, occurred_at FROM analytics.timelines WHERE event_type_key = 1",
        "SELECT * FROM analytics.events WHERE occurred_at > '2024-01-01' AND account_id = 'acme'",
        "SELECT event_type, count(*) FROM analytics.events GROUP BY 1",
    ):
        plan = rows(analyst, f"EXPLAIN {query}")
        assert plan == rows(party.owner, f"EXPLAIN {query}")
        assert "own_accounts" not in str(plan)
