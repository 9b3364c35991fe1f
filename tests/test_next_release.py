"""The mechanics of an update, by a pretended next release that changes a little of everything."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from catalogue import differences, snapshot
from pipeline import rows, value
from psycopg import errors
from servers import Server, servers
from test_upgrade import NEW, ROOT

NEXT = f"{NEW}.next"
ROLES = {"analyst": "ana", "reader": "rea", "ingest": "ing"}
ROOM = """-- Room 81, the next one.

CREATE FUNCTION spectrum._create_next()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.next') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.next (next_id bigserial PRIMARY KEY, note text);
    -- A view of what an old view shows from now on; a comment has a semicolon;
    CREATE VIEW analytics.next AS
    SELECT next.note, state.next_one FROM spectrum.next CROSS JOIN spectrum.pipeline AS state;
    COMMENT ON VIEW analytics.next IS 'Next; and last.';
END
$$;
COMMENT ON FUNCTION spectrum._create_next() IS 'Room 81: makes spectrum.next.';

CREATE FUNCTION analytics.next_question(p_days integer DEFAULT 1)
RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT p_days
$$;
COMMENT ON FUNCTION analytics.next_question(integer) IS 'A question that was not there before.';
"""
MIGRATION = """    ALTER TABLE spectrum.run_log ADD COLUMN IF NOT EXISTS
        next_one integer NOT NULL DEFAULT 7 CONSTRAINT next_one_is_positive CHECK (next_one > 0);
    ALTER TABLE @extschema@.raw_events SET (autovacuum_vacuum_cost_delay = 1);
END
$$;
COMMENT ON FUNCTION spectrum._migrate_tables()"""
# file: pattern, what comes instead; each has to be found
CHANGES = [
    ("Makefile", r"(\t80_operations/90_setup.sql)", r"\t81_next.sql \\\n\1"),
    ("extension/spectrum.control", re.escape(NEW), NEXT),
    ("80_operations/85_migrations.sql", rf"SELECT '{re.escape(NEW)}'", f"SELECT '{NEXT}'"),
    ("80_operations/85_migrations.sql",
     r"END\n\$\$;\nCOMMENT ON FUNCTION spectrum._migrate_tables\(\)", MIGRATION),
    ("80_operations/90_setup.sql", r"\n    \] LOOP", ", 'next'\n    ] LOOP"),
    # A column more, of a table and of a view.
    ("12_run_log.sql", r"(CREATE TABLE spectrum.run_log.*?)\n    \);",
     r"\1,\n        next_one integer NOT NULL DEFAULT 7"
     r"\n            CONSTRAINT next_one_is_positive CHECK (next_one > 0)\n    );"),
    ("80_operations/30_status.sql", r"(CREATE VIEW spectrum.pipeline AS.*?)\n    FROM \(",
     r"\1,\n        12 AS next_one\n    FROM ("),
    ("80_operations/30_status.sql", r"'The state of the pipeline, one row\.", "'Another comment."),
    ("20_staging/00_raw_events.sql", r"fillfactor = 50",
     "fillfactor = 50, autovacuum_vacuum_cost_delay = 1"),
    # Another result, another name of an argument, another default.
    ("80_operations/20_schedule.sql", r"(_job_name\(\)\nRETURNS) text", r"\1 name"),
    ("80_operations/20_schedule.sql", r"SELECT ('spectrum ' .. current_database\(\))",
     r"SELECT (\1)::name"),
    ("80_operations/10_run.sql", r"_take_turn\(p_name text\)(.*?)p_name\)",
     r"_take_turn(p_turn text)\1p_turn)"),
    ("80_operations/20_schedule.sql", r"DEFAULT '\*/5 \* \* \* \*'\)", "DEFAULT '* * * * *')"),
]  # fmt: skip
# A view of the user's stands on it, so it cannot go first.
GONE, INSTEAD = "spectrum._complaint", "spectrum._objection"


def build(tree: Path) -> None:
    for name in ("extension", "scripts"):
        shutil.copytree(ROOT / name, tree / name)
    shutil.copy(ROOT / "Makefile", tree)
    sources = tree / "extension" / "src"
    (sources / "81_next.sql").write_text(ROOM)
    (tree / "extension" / "updates" / f"{NEW}--{NEXT}.sql").write_text("")
    for name, pattern, replacement in CHANGES:
        path = tree / name if (tree / name).exists() else sources / name
        text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.DOTALL)
        assert count == 1, f"{name}: {pattern}"
        path.write_text(text)
    texts = {path: path.read_text() for path in sources.rglob("*.sql")}
    assert any(f"CREATE FUNCTION {GONE}(" in text for text in texts.values())
    for path, text in texts.items():
        path.write_text(text.replace(f"{GONE}(", f"{INSTEAD}("))
    extension = "extension/spectrum--"
    subprocess.run(
        ["make", "--silent", f"SCRIPT={extension}{NEXT}.sql", f"FROZEN={extension}{NEW}.sql",
         f"UPDATE={extension}{NEW}--{NEXT}.sql", "all"],
        cwd=tree, check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers() as place:
        bindir, extensions = place.private_bindir()
        tree = tmp_path_factory.mktemp("next") / "tree"
        build(tree)
        for path in (tree / "extension").glob("spectrum[.-]*"):
            shutil.copy(path, extensions)
        server = place.initdb("data", bindir=bindir).start()
        with psycopg.connect(server.dsn(), autocommit=True) as db:
            db.execute("CREATE ROLE ana; CREATE ROLE rea; CREATE ROLE ing")
            db.execute("CREATE ROLE ope; CREATE ROLE cap; CREATE ROLE ten; CREATE ROLE tre")
            db.execute("CREATE DATABASE fresh")
            db.execute("CREATE DATABASE former")
        with psycopg.connect(server.dsn("former"), autocommit=True) as db:
            db.execute(f"CREATE EXTENSION spectrum VERSION '{NEW}'")
            grant(db)
        yield server


def grant(db: psycopg.Connection) -> None:
    for kind, role in ROLES.items():
        db.execute(f"SELECT spectrum.grant_{kind}('{role}')")


@contextmanager
def new_database(server: Server, template: str) -> Iterator[psycopg.Connection]:
    """The one before goes."""
    with psycopg.connect(server.dsn(), autocommit=True) as db:
        db.execute("DROP DATABASE IF EXISTS copy")
        db.execute(f"CREATE DATABASE copy TEMPLATE {template}")
    with psycopg.connect(server.dsn("copy"), autocommit=True) as db:
        yield db


@pytest.fixture
def former(server: Server) -> Iterator[psycopg.Connection]:
    """A database with what is now the present release."""
    with new_database(server, "former") as db:
        yield db


@pytest.fixture
def first(server: Server) -> Iterator[psycopg.Connection]:
    """A database with the first release."""
    with new_database(server, "template0") as db:
        db.execute("CREATE EXTENSION spectrum VERSION '1.0'")
        grant(db)
        yield db


@pytest.fixture(scope="module")
def fresh(server: Server) -> list[str]:
    with psycopg.connect(server.dsn("fresh"), autocommit=True) as db:
        db.execute("CREATE EXTENSION spectrum")
        grant(db)
        return snapshot(db)


def test_updated_is_as_new(former: psycopg.Connection, fresh: list[str]) -> None:
    before = snapshot(former)
    former.execute("ALTER EXTENSION spectrum UPDATE")
    assert differences(fresh, snapshot(former)) == ""
    assert len(differences(before, fresh).splitlines()) > 30, "the next release changes something"


def test_from_the_first_release_in_one_go(first: psycopg.Connection, fresh: list[str]) -> None:
    first.execute("ALTER EXTENSION spectrum UPDATE")
    assert differences(fresh, snapshot(first)) == ""


def test_what_is_missing_is_seen(former: psycopg.Connection, fresh: list[str]) -> None:
    """The comparison itself: one thing taken back is one difference."""
    former.execute("ALTER EXTENSION spectrum UPDATE")
    for statement in (
        "COMMENT ON TABLE spectrum.next IS 'other'",
        "ALTER TABLE raw_events RESET (autovacuum_vacuum_cost_delay)",
        "ALTER TABLE spectrum.run_log ALTER COLUMN next_one DROP DEFAULT",
        "REVOKE SELECT ON analytics.next FROM rea",
        "GRANT EXECUTE ON FUNCTION analytics.next_question(integer) TO PUBLIC",
        "ALTER EXTENSION spectrum ADD TABLE spectrum.next",
        "ALTER FUNCTION analytics.next_question(integer) VOLATILE",
    ):
        with former.transaction(force_rollback=True):
            former.execute(statement)
            assert differences(fresh, snapshot(former)) != "", statement


def test_grants_are_renewed_over_several_releases(first: psycopg.Connection) -> None:
    """Also where each one brings views, and the grants wait for the end of the transaction."""
    with first.transaction():
        first.execute(f"ALTER EXTENSION spectrum UPDATE TO '{NEW}'")
        first.execute("CREATE VIEW analytics.between AS SELECT 1 AS one")
        first.execute("ALTER EXTENSION spectrum UPDATE")
    for role, view in (("rea", "between"), ("rea", "next"), ("ana", "next")):
        assert value(first, f"SELECT has_table_privilege('{role}', 'analytics.{view}', 'SELECT')")


def test_what_came_after_the_first_release_is_renewed_too(former: psycopg.Connection) -> None:
    calls = {
        "spectrum.grant_operator('ope')",
        "spectrum.grant_capture('cap')",
        "spectrum.grant_tenant('ten', 'acme', 'analyst')",
        "spectrum.grant_tenant('tre', 'acme', 'reader')",
    }
    for call in calls:
        former.execute(f"SELECT {call}")
    former.execute("ALTER EXTENSION spectrum UPDATE")
    renewed = value(former, "SELECT grants FROM spectrum.releases ORDER BY since DESC LIMIT 1")
    assert calls <= set(renewed)
    assert {f"spectrum.grant_{kind}('{role}')" for kind, role in ROLES.items()} <= set(renewed)
    assert len(renewed) == len(calls) + len(ROLES)
    for role in ("ten", "tre"):
        seen = f"SELECT has_table_privilege('{role}', 'analytics.next', 'SELECT')"
        assert value(former, seen)


@pytest.mark.parametrize(
    "own",
    [
        "CREATE VIEW own AS SELECT spectrum._job_name()",
        f"CREATE VIEW own AS SELECT {GONE}('a', 'b', '{{}}')",
    ],
)
def test_what_is_the_users_own_is_not_dropped(former: psycopg.Connection, own: str) -> None:
    former.execute(own)
    before = snapshot(former)
    with pytest.raises((errors.DependentObjectsStillExist, errors.InvalidFunctionDefinition)):
        former.execute("ALTER EXTENSION spectrum UPDATE")
    assert snapshot(former) == before
    former.execute("DROP VIEW own")
    former.execute("ALTER EXTENSION spectrum UPDATE")
    assert rows(former, "SELECT release FROM spectrum.releases ORDER BY 1") == [(NEW,), (NEXT,)]
