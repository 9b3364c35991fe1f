"""Hostile names and values change nothing but data, and nobody's code runs but Spectrum's."""

from __future__ import annotations

import json
import re
from typing import Any

import psycopg
import pytest
from pipeline import drain, event, insert, rows, value
from psycopg import errors
from psycopg.conninfo import make_conninfo
from test_static import SCHEMAS

NASTY = [
    "'; DROP TABLE raw_events; --",
    '"; DROP TABLE raw_events; --',
    "$$; DROP TABLE raw_events; $$",
    "'); SELECT pg_terminate_backend(pg_backend_pid()); --",
    "\\'; DROP TABLE raw_events; --",
    "x' || (SELECT version()) || '",
    "%I %s %L %1$s %%",
    "{} {0} ${HOME} :name ?",
    "\\x41\\u0041 \\",
    "{1,2}",
    "(a,b)",
    "*/ /* --",
    "Robert\"')",
    "public.raw_events",
    "warehouse.fact_events",
    "pg_temp.x",
    "_check_name",
    "line\nfeed",
    "carriage\rreturn",
    "tab\there \x1b[31mred\x07 \x9b31mred \u2028",
    "\u202ereversed\u2066",
    "a" * 63,
    "\u00e9" * 32,
    "x" * 200,
    "NULL",
    "null",
    "",
    " ",
    "*",
    "%",
    "_",
    "NaN",
    "-infinity",
    "now",
]
CATALOGUE = """
    SELECT 'class', c.oid::regclass::text, relkind::text || relowner || coalesce(relacl::text, '')
        || coalesce(reloptions::text, '') || relhastriggers || relrowsecurity
    FROM pg_class AS c
    WHERE relnamespace::regnamespace::text !~ '^pg_(toast|temp)' AND c.oid >= 16384
    UNION ALL
    SELECT 'routine', oid::regprocedure::text, md5(prosrc) || coalesce(proacl::text, '')
        || coalesce(proconfig::text, '') || prosecdef
    FROM pg_proc WHERE oid >= 16384
    UNION ALL
    SELECT 'role', rolname, r::text FROM pg_roles AS r
    UNION ALL
    SELECT 'setting', setrole::text, setconfig::text FROM pg_db_role_setting
    UNION ALL
    SELECT 'schema', nspname, coalesce(nspacl::text, '') FROM pg_namespace
    WHERE nspname !~ '^pg_(toast_)?temp'
    UNION ALL
    SELECT 'other', classid::regclass::text || objid, deptype::text FROM pg_depend
    WHERE objid >= 16384 AND classid IN ('pg_cast'::regclass, 'pg_operator'::regclass,
        'pg_trigger'::regclass, 'pg_policy'::regclass, 'pg_rewrite'::regclass)
    UNION ALL
    SELECT 'config', name, setting FROM (
        SELECT 'config', to_jsonb(c)::text FROM spectrum.config AS c
    ) AS kept (name, setting)
"""
# What a text can do wrong where it is taken for SQL or for a name.
SIGNS_OF_INJECTION = ("42", "3F", "0A", "XX", "22P03", "25", "2F", "57", "58")


def catalogue(db: psycopg.Connection) -> set[tuple]:
    return set(rows(db, CATALOGUE))


def payloads() -> list[dict[str, Any]]:
    told = []
    for text in NASTY:
        everywhere = {text: text, "plan": text, "feature": text, "endpoint": text, "mrr": text,
                      "utm_source": text, "service": text, "experiment": text, "variant": text,
                      "currency": text}  # fmt: skip
        for kind in (text, "experiment_exposure", "feature_used", "request", "page_view",
                     "subscription_started"):  # fmt: skip
            told.append(event(kind, account_id=text, user_id=text, properties=everywhere,
                              geo={"country": text, "region": text, "city": text}))  # fmt: skip
        told += [
            event("a", event_id=text), event("a", occurred_at=text), event("a", timestamp=text),
            event("a", properties={"revenue": text, "currency": text}), event("a", **{text: text}),
            event("a", properties=text), event("a", geo=text),
        ]  # fmt: skip
    return told


def one_line(db: psycopg.Connection) -> None:
    """Whatever is kept or told for people is one line, without control characters."""
    control = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
    for query in (
        "SELECT error_msg FROM raw_events",
        "SELECT coalesce(detail, '') || coalesce(error_msg, '') FROM spectrum.run_log",
        "SELECT coalesce(error_msg, '') FROM spectrum.tasks",
        "SELECT coalesce(error_msg, '') FROM spectrum.report_definitions",
        "SELECT work FROM spectrum.progress",
        "SELECT message FROM spectrum.health()",
        "SELECT coalesce(last_run_error, '') FROM spectrum.status()",
    ):
        texts = [text for (text,) in rows(db, query) if text]
        assert [text for text in texts if control.search(text)] == [], query


def test_payloads_change_nothing_but_data(owner_db: psycopg.Connection) -> None:
    owner_db.execute("SELECT spectrum.ensure_partitions('2024-01-01', '2024-04-01')")
    before = catalogue(owner_db)
    told = payloads()
    insert(owner_db, told)
    counts = drain(owner_db)
    owner_db.execute("CALL spectrum.run()")
    assert counts.claimed == len(told)
    assert counts.loaded > len(NASTY) * 5
    assert counts.failed > len(NASTY)
    assert catalogue(owner_db) == before
    one_line(owner_db)
    kinds = {kind for (kind,) in rows(owner_db, "SELECT event_type FROM analytics.event_types")}
    assert kinds >= set(NASTY) - {"", "*"}  # * is no account
    wrong = rows(owner_db, "SELECT check_name FROM spectrum.verify() WHERE NOT ok")
    assert wrong == []


def routines_with_texts(db: psycopg.Connection) -> list[tuple[str, str, list[str], list[str]]]:
    """Every public function and procedure that takes a text, JSON or a list of them."""
    return rows(
        db,
        """
        SELECT prokind::text, pronamespace::regnamespace || '.' || quote_ident(proname),
            proargnames[:pronargs], ARRAY(SELECT format_type(t, NULL)
                FROM unnest(proargtypes) WITH ORDINALITY AS a (t, n) ORDER BY n)
        FROM pg_proc
        WHERE pronamespace IN ('spectrum'::regnamespace, 'analytics'::regnamespace)
            AND NOT starts_with(proname, '_') AND pronargs > 0
            AND proargtypes::oid[] && ARRAY['text', 'jsonb', 'text[]', 'regproc']::regtype[]::oid[]
            -- It makes and drops things on purpose.
            AND proname <> 'uninstall'
        ORDER BY 2
        """,
    )


def hostile_values(kind: str, text: str) -> list[Any]:
    quoted = json.dumps(text)
    return {
        "text": [text],
        "regproc": [text],
        "text[]": [[text], [text, text]],
        "jsonb": [quoted, f"[{quoted}]", f"[{quoted}, {quoted}]", f"{{{quoted}: {quoted}}}",
                  f'[{{"event": {quoted}, "where": {{{quoted}: {quoted}}}}}]'],
    }[kind]  # fmt: skip


ORDINARY = {
    "jsonb": '["a", "b"]', "text": "a", "text[]": ["a"], "interval": "1 day", "uuid": None,
    "double precision[]": [0.5, 0.5], "bigint[]": [1, 2], "regproc": "pg_catalog.now",
}  # fmt: skip


def test_arguments_change_nothing_but_data(owner_db: psycopg.Connection) -> None:
    """Each text argument of each public function in turn, and what is defined so, kept."""
    owner_db.execute("SELECT spectrum.ensure_partitions('2024-01-01', '2024-04-01')")
    insert(owner_db, [event("a", user_id="u", account_id="acme"), event("b", user_id="u")])
    owner_db.execute("CALL spectrum.run()")
    before = catalogue(owner_db)
    found = routines_with_texts(owner_db)
    assert len(found) > 30
    refused = answered = 0
    for kind, name, names, types in found:
        for at, of in enumerate(types):
            if of not in ("text", "jsonb", "text[]", "regproc"):
                continue
            for text in NASTY[:14]:
                for hostile in hostile_values(of, text):
                    # Ordinary values up to there, so that this one is looked at.
                    given = {names[n]: ORDINARY.get(types[n]) for n in range(at)}
                    given = {each: v for each, v in given.items() if v is not None}
                    given[names[at]] = hostile
                    typed = dict(zip(names, types, strict=True))
                    arguments = ", ".join(f"{each} => %s::{typed[each]}" for each in given)
                    verb = "CALL" if kind == "p" else "SELECT"
                    try:
                        owner_db.execute(f"{verb} {name}({arguments})", list(given.values()))
                        answered += 1
                    except psycopg.Error as error:
                        refused += 1
                        state = error.sqlstate or ""
                        # A name of a function that there is not is an error of its type.
                        if of == "regproc" and state in ("42883", "42602", "3F000", "42725",
                                                         "42601", "42704"):  # fmt: skip
                            continue
                        assert not state.startswith(SIGNS_OF_INJECTION) or (
                            # What lacks for the call is not there: its first arguments.
                            state in ("42883",)
                            and "does not exist" in str(error)
                            and f"function {name}(" in str(error)
                        ), (name, arguments, hostile, str(error))
    assert refused > 1000 and answered > 200
    # Names of definitions are data: what was taken is kept, refreshed, and shown.
    owner_db.execute("CALL spectrum.run()")
    one_line(owner_db)
    after = catalogue(owner_db)
    assert {row for row in after ^ before if row[0] != "config"} == set()


@pytest.mark.parametrize(
    "name", ["a" * 64, "\u00e9" * 32, "", "line\nfeed", "null\x7f", "bell\x07", "\x1b[31m"]
)
def test_names_that_are_refused(owner_db: psycopg.Connection, name: str) -> None:
    for call in (
        """define_funnel(%s, '["a"]')""", "define_retention(%s)", "define_feature(%s, 'a')",
        "define_metric(%s, 'proportion', 'a')", "define_report(%s, 'pg_catalog.now')",
        """define_experiment(%s, '{"a": 1, "b": 1}', 'a', '[]')""",
        """define_attribution(%s, '"a"')""", "define_paths(%s)",
    ):  # fmt: skip
        with pytest.raises(errors.InvalidParameterValue) as refused:
            owner_db.execute(f"SELECT spectrum.{call}", (name,))
        assert "p_name" in str(refused.value.diag.message_primary)


# Whose code runs.


def test_every_routine_looks_only_where_it_says(db: psycopg.Connection) -> None:
    """All but the procedures that commit, which cannot, and are attacked below."""
    loose = rows(
        db,
        """
        SELECT proname, prokind::text FROM pg_proc
        WHERE pronamespace::regnamespace::text = ANY (%s) AND prokind <> 'a'
            AND coalesce('search_path=pg_catalog, pg_temp' <> ALL (proconfig), true)
        """,
        SCHEMAS,
    )
    assert {kind for _, kind in loose} == {"p"}
    for name, _ in loose:
        body = value(db, "SELECT prosrc FROM pg_proc WHERE proname = %s", name)
        assert "COMMIT;" in body or "CALL spectrum._carry_out(" in body, name
    assert {"run", "reprocess"} <= {name for name, _ in loose}


TRAPS = """
CREATE SCHEMA attacker;
CREATE TABLE attacker.caught (what text);
CREATE FUNCTION attacker.caught(p_what text) RETURNS void LANGUAGE sql
AS $$ INSERT INTO attacker.caught VALUES (p_what) $$;
"""
OPERATORS = {
    "=": "boolean", "<>": "boolean", "<": "boolean", "<=": "boolean", ">": "boolean",
    ">=": "boolean", "+": "bigint", "-": "bigint", "||": "text", "->>": "text",
}  # fmt: skip
TRAPPED_TYPES = ["integer", "bigint", "text", "boolean", "timestamptz", "jsonb", "interval"]
FUNCTIONS = [
    "clock_timestamp()", "now()", "pg_backend_pid()", "set_config(text, text, boolean)",
    "current_setting(text)", "format(text, text)", "jsonb_build_object(text, text)",
    "jsonb_extract_path_text(jsonb, text)", "to_jsonb(text)", "concat(text, text)",
    "pg_try_advisory_lock(bigint)", "pg_advisory_unlock(bigint)", "quote_ident(text)",
    "pg_try_advisory_xact_lock(bigint)", "least(bigint, bigint)", "length(text)",
    "jsonb_typeof(jsonb)", "coalesce(text, text)", "int8(text)", "translate(text, text, text)",
]  # fmt: skip


def set_traps(db: psycopg.Connection, schema: str) -> int:
    """Functions and operators that are found first on the path; they note that they were called."""
    number = 0
    for operator, returns in OPERATORS.items():
        for left in TRAPPED_TYPES:
            number += 1
            db.execute(
                f"CREATE FUNCTION {schema}.trap_{number}({left}, {left}) RETURNS {returns}"
                " LANGUAGE plpgsql AS $$ BEGIN"
                f" PERFORM attacker.caught('{operator} {left}'); RETURN NULL; END $$"
            )
            db.execute(
                f"CREATE OPERATOR {schema}.{operator} (LEFTARG = {left}, RIGHTARG = {left},"
                f" FUNCTION = {schema}.trap_{number})"
            )
    for signature in FUNCTIONS:
        name, _, arguments = signature.partition("(")
        number += 1
        db.execute(
            f'CREATE FUNCTION {schema}."{name}"({arguments} RETURNS text LANGUAGE plpgsql'
            f" AS $$ BEGIN PERFORM attacker.caught('{signature}'); RETURN NULL; END $$"
        )
    return number


PROCEDURES = """
    SELECT format('CALL %%s.%%I(%%s)', pronamespace::regnamespace, proname, CASE proname
        WHEN '_carry_out' THEN quote_literal('reprocess') || ', ' || quote_literal('{}') || ', '
            || quote_literal('requeued') || ', NULL'
        WHEN 'purge_raw' THEN quote_literal('1 day') || '::pg_catalog.interval'
        WHEN 'pack_facts' THEN quote_literal('400 days') || '::pg_catalog.interval'
        WHEN 'purge_facts' THEN quote_literal('400 days') || '::pg_catalog.interval' ELSE '' END)
    FROM pg_proc
    WHERE prokind = 'p' AND pronamespace::regnamespace::text = ANY (%s) AND proname <> 'uninstall'
    ORDER BY proname
"""


def test_nobody_elses_code_runs(owner_db: psycopg.Connection, owner_dsn: str) -> None:
    """Every procedure, with a path that leads to the attacker first. As the owner: whoever may
    call them and can be made to set such a path."""
    owner_db.execute(TRAPS)
    assert set_traps(owner_db, "attacker") > 80
    insert(owner_db, [event("a", user_id="u", account_id="x"), event("b", user_id="u"), event("")])
    calls = [call for (call,) in rows(owner_db, PROCEDURES, SCHEMAS)]
    assert any("spectrum.run(" in call for call in calls)
    # The traps work.
    with psycopg.connect(
        make_conninfo(owner_dsn, options="-c search_path=attacker,public,pg_catalog"),
        autocommit=True,
    ) as caught:
        caught.execute("SELECT now(), 1::bigint = 1::bigint")
        assert caught.execute("SELECT count(*)::text FROM attacker.caught").fetchone() == ("2",)
        caught.execute("TRUNCATE attacker.caught")
        for call in calls:
            caught.execute(call)
    with psycopg.connect(owner_dsn, autocommit=True) as temporary:
        temporary.execute("CREATE TEMP TABLE raw_events (payload jsonb)")
        set_traps(temporary, "pg_temp")
        temporary.execute("SET search_path = pg_temp, public, pg_catalog")
        for call in calls:
            temporary.execute(call)
    assert rows(owner_db, "SELECT what FROM attacker.caught") == []
    assert value(owner_db, "SELECT count(*) FROM raw_events WHERE status = 'pending'") == 0


def test_errors_of_others_are_kept_in_one_line(owner_db: psycopg.Connection) -> None:
    """An error that a run meets may say anything; the log keeps it as one line."""
    owner_db.execute(
        """
        CREATE FUNCTION public.fails(p_users bigint[])
        RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
        LANGUAGE plpgsql STABLE AS $$
        BEGIN RAISE EXCEPTION E'first\\nsecond\\r\\x1b[31mred'; END $$
        """
    )
    owner_db.execute("SELECT spectrum.define_report('fails', 'public.fails')")
    insert(owner_db, [event("a", user_id="u")])
    warned: list[str] = []
    owner_db.add_notice_handler(lambda notice: warned.append(str(notice.message_primary)))
    owner_db.execute("CALL spectrum.run()")
    told = "first second [31mred"
    assert warned == [f"report fails is given up: {told}"]
    assert value(owner_db, "SELECT error_msg FROM spectrum.report_definitions") == told

    # A step of a run that fails, and a task.
    owner_db.execute(
        """
        CREATE OR REPLACE FUNCTION spectrum._upkeep() RETURNS text LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION E'first\\nsecond\\r\\x1b[31mred'; END $$;
        CREATE OR REPLACE FUNCTION spectrum._do_reprocess(p_task_id bigint) RETURNS boolean
        LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION E'first\\nsecond\\r\\x1b[31mred'; END $$;
        """
    )
    owner_db.execute("SELECT spectrum.request('reprocess')")
    owner_db.execute("CALL spectrum.run()")
    assert told in warned[-1] and "\n" not in warned[-1]
    assert value(owner_db, "SELECT count(*) FROM spectrum.run_log WHERE error_msg ~ %s", "first")
    assert value(owner_db, "SELECT error_msg FROM spectrum.tasks").startswith(told)
    one_line(owner_db)
