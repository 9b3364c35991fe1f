"""A tenant sees what he would see if his account were alone in the database, and nothing else:
tried against every view and function of analytics found in the catalogue, so a new one without the
filter fails here. What tenants try is in test_tenants_spying.py.
"""

from __future__ import annotations

import re

import psycopg
import pytest
from conftest import Connect, MakeDb, MakeRole
from pipeline import insert, rows, value
from psycopg import errors
from psycopg.conninfo import make_conninfo
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
    fill,
    marked,
    question,
    quoted,
    shown,
    views,
)

NO_ACCOUNT = "never heard of"


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
            assert rows(tenant, "SELECT * FROM analytics.user_days_state") == [(False, False)]
        else:
            assert expected, f"{view} is empty, so this shows nothing"
            assert seen == expected, view
            assert marked(seen) == [], view
            assert view in OF_THE_PRODUCT or marked(shown(party.owner, f"analytics.{view}")), (
                f"{view} tells nothing of the other account to anyone, so this shows nothing"
            )
    # Whether events wait would tell of those of others.
    assert rows(tenant, "SELECT DISTINCT is_current FROM analytics.served_reports") == [(False,)]
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
    with party.superuser() as admin:
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
    with party.superuser() as admin:
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
