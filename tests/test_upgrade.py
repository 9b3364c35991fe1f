"""From one release to the next: whoever comes from 1.0 has what a new install has, and goes on.

1.0 is frozen. What 1.1 changes is tested as it is; what an update may have to do beyond that, by a
pretended next release.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import psycopg
import pytest
from backups import assert_finishes, half_done, tool, views
from catalogue import differences, snapshot
from conftest import OWNER, Connect, MakeDb, MakeRole, run_sql
from pipeline import rows, value
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict

ROOT = Path(__file__).resolve().parents[1]
FROZEN = {"1.0": "ff7aa78cd725e5bcc63c2cfb5e58cf7d5b45d4a20e7291fef1d2f4f137f745e4"}
KINDS = ("analyst", "ingest", "reader")
CONTROL = (ROOT / "extension" / "spectrum.control").read_text()
NEW = re.findall(r"default_version = '([\d.]+)'", CONTROL)[0]


def grant(db: psycopg.Connection, roles: dict[str, str]) -> None:
    for kind in KINDS:
        if kind in roles:
            db.execute(f"SELECT spectrum.grant_{kind}('{roles[kind]}')")


@pytest.mark.parametrize("version", FROZEN)
def test_a_release_that_is_out_does_not_change(version: str) -> None:
    script = (ROOT / "extension" / f"spectrum--{version}.sql").read_bytes()
    assert hashlib.sha256(script).hexdigest() == FROZEN[version]


def test_the_release_is_the_same_everywhere(db: psycopg.Connection) -> None:
    assert value(db, "SELECT spectrum._release()") == NEW
    assert value(db, "SELECT extversion FROM pg_extension WHERE extname = 'spectrum'") == NEW
    assert rows(db, "SELECT release, migrated_from FROM spectrum.releases") == [(NEW, None)]
    assert f'"version": "{NEW}.0"' in (ROOT / "META.json").read_text()
    assert f"## {NEW}.0" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("owner", ["superuser", "owner"])
def test_updated_is_as_new(
    owner: str, make_db: MakeDb, make_role: MakeRole, connect: Connect, tmp_path: Path
) -> None:
    roles = {kind: make_role(kind) for kind in (*KINDS, "part")}
    old, new = make_db("old", template=""), make_db("new", template="")
    copy = make_db("copy", template="")
    if owner == "owner":
        for dsn in (old, new, copy):
            run_sql(dsn, f'ALTER DATABASE "{conninfo_to_dict(dsn)["dbname"]}" OWNER TO {OWNER}')
        old, new, copy = (f"{dsn} user={OWNER}" for dsn in (old, new, copy))
    with connect(old) as db:
        db.execute("CREATE EXTENSION spectrum VERSION '1.0'")
        grant(db, roles)
        # A part of what a grant covers, given by hand, stays what it is.
        db.execute(f"GRANT SELECT ON analytics.active_users TO {roles['part']}")
        db.execute("ALTER EXTENSION spectrum UPDATE")
        updated = snapshot(db)
        assert rows(db, "SELECT spectrum.setup()") and snapshot(db) == updated
    with connect(new) as db:
        db.execute("CREATE EXTENSION spectrum")
        grant(db, roles)
        db.execute(f"GRANT SELECT ON analytics.active_users TO {roles['part']}")
        assert differences(snapshot(db), updated) == ""
    # Its dump is one of the new release, and the rights are in it.
    dump = tmp_path / "dump"
    tool("pg_dump", old, "-Fc", "-f", str(dump))
    tool("pg_restore", copy, "-1", "-e", str(dump))
    with connect(copy) as db:
        assert differences(updated, snapshot(db)) == ""


def test_a_history_of_1_0_goes_on(make_db: MakeDb, make_role: MakeRole, connect: Connect) -> None:
    dsn, analyst = make_db("old", template=""), make_role("analyst")
    with connect(dsn) as db:
        db.execute("CREATE EXTENSION spectrum VERSION '1.0'")
        grant(db, {"analyst": analyst})
        half_done(db)
        shown = views(db)
        db.execute("ALTER EXTENSION spectrum UPDATE")
        assert views(db) == shown
        assert_finishes(db)
    with connect(f"{dsn} user={analyst}") as db:
        assert value(db, "SELECT count(*) FROM analytics.events") > 0
        assert value(db, 'SELECT count(*) FROM analytics.funnel(\'["visit", "buy"]\')') == 2


def test_a_restored_dump_of_1_0_is_brought_here(
    make_db: MakeDb, make_role: MakeRole, connect: Connect, tmp_path: Path
) -> None:
    """By the update, restored beside the functions of 1.0; or beside today's, without the rights,
    which may name functions that are gone, by setup()."""
    roles = {kind: make_role(kind) for kind in KINDS}
    old, new, by_setup, by_update = (
        make_db(name, template="") for name in ("old", "new", "by_setup", "by_update")
    )
    with connect(old) as db:
        db.execute("CREATE EXTENSION spectrum VERSION '1.0'")
        grant(db, roles)
        half_done(db)
    dump = tmp_path / "dump"
    tool("pg_dump", old, "-Fc", "-f", str(dump))
    tool("pg_restore", by_setup, "-1", "-e", "--no-privileges", str(dump))
    with connect(by_setup) as db:
        ((ok, cure),) = rows(db, "SELECT ok, what_to_do FROM spectrum.health()")
        assert not ok
        with pytest.raises(errors.ObjectNotInPrerequisiteState) as refused:
            db.execute("CALL spectrum.run()")
        assert refused.value.diag.message_primary == (
            f"the tables are of release 1.0, the functions of {NEW}"
        )
        assert refused.value.diag.message_hint == "As their owner: SELECT spectrum.setup();"
        db.execute(cure.removeprefix("As the owner of the tables: "))
        assert value(db, "SELECT ok FROM spectrum.health() WHERE check_name = 'release'")
        grant(db, roles)
        after_setup = snapshot(db)
        assert_finishes(db)
    run_sql(by_update, "SET row_security = off", "CREATE EXTENSION spectrum VERSION '1.0'")
    tool("pg_restore", by_update, "-1", "-e", str(dump))
    with connect(by_update) as db:
        db.execute("ALTER EXTENSION spectrum UPDATE")
        assert differences(after_setup, snapshot(db)) == ""
    with connect(new) as db:
        db.execute("CREATE EXTENSION spectrum")
        grant(db, roles)
        fresh = snapshot(db)
    # The months and the user's own index are the history's.
    own = re.compile(r"fact_events_\d{4}_\d\d|users_own")
    assert differences(
        [line for line in fresh if not own.search(line)],
        [line for line in after_setup if not own.search(line)],
    ) == ""  # fmt: skip


def test_after_an_update_by_a_superuser_health_names_what_mends_it(
    make_db: MakeDb, connect: Connect
) -> None:
    dsn = make_db("old", template="")
    run_sql(dsn, f'ALTER DATABASE "{conninfo_to_dict(dsn)["dbname"]}" OWNER TO {OWNER}')
    run_sql(f"{dsn} user={OWNER}", "CREATE EXTENSION spectrum VERSION '1.0'")
    with connect(dsn) as superuser:
        superuser.execute("ALTER EXTENSION spectrum UPDATE")
        query = "SELECT ok, what_to_do FROM spectrum.health() WHERE check_name = 'ownership'"
        ((ok, cure),) = rows(superuser, query)
        assert not ok
        superuser.execute(cure.removeprefix("As a superuser: "))
    with connect(f"{dsn} user={OWNER}") as db:
        db.execute("CALL spectrum.run()")
        assert rows(db, query)[0][0]
