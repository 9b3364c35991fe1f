"""Fixtures: every test has a database of its own, copied from a template that holds Spectrum.

The server is the private cluster of `make test`, found by PGHOST, PGPORT, PGUSER and PGPASSWORD.
By hand: `scripts/cluster start test fsync=off jit=off`, then
`scripts/cluster run test .venv/bin/pytest tests/...`.

Under pytest-xdist (`make test`) each worker has a server of its own, so that no test meets what
another one does to roles, locks, pg_cron, settings or whatever else a server has once.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from faults.rounds import make_template
from faults.server import Server
from psycopg.conninfo import make_conninfo
from pytest_postgresql import factories
from pytest_postgresql.executors.noop import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor
from rich.console import Console
from spectrum_shell import demo
from spectrum_shell.demo_delivery import make_month
from tenancy import NOBODYS, OTHER_EVENTS, OWN, OWN_EVENTS, Party, fill

OWNER = "spectrum_test_owner"  # owns a database, and is nothing else
ROLE_PREFIX = "spectrum_test_"
TEMPLATES = {"": "tests", "spectrum": "tests_spectrum", "owner": "tests_owner"}

ROOT = Path(__file__).resolve().parents[1]
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # "gw0", "gw1", ...; None without pytest-xdist

MakeDb = Callable[..., str]
Connect = Callable[..., psycopg.Connection]
MakeRole = Callable[..., str]


def take_own_server() -> None:
    """Points this worker's environment to its own of the clusters that SPECTRUM_TEST_CLUSTERS
    names: to the first one for gw0, and so on."""
    clusters = dict(enumerate(os.environ.get("SPECTRUM_TEST_CLUSTERS", "").split()))
    name = clusters.get(int(str(WORKER).removeprefix("gw")))
    if name is None:
        raise pytest.UsageError(f"no server for the worker {WORKER} in SPECTRUM_TEST_CLUSTERS")
    found = subprocess.run(
        [ROOT / "scripts" / "cluster", "run", name, "env", "-0"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise pytest.UsageError(found.stderr.strip())
    os.environ.update(line.split("=", 1) for line in found.stdout.split("\0") if line)


if WORKER:
    take_own_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for pg_cron's minutes comes first: the other workers have work beside it."""
    if WORKER:
        items.sort(key=lambda item: "cron_dsn" not in getattr(item, "fixturenames", ()))


def server() -> dict[str, str | None]:
    return {
        "host": os.environ.get("PGHOST"),
        "port": os.environ.get("PGPORT"),
        "user": os.environ.get("PGUSER"),
        "password": os.environ.get("PGPASSWORD"),
    }


def dsn_of(dbname: str, user: str | None = None) -> str:
    """DSN of a database of the test server; another user needs no password on its socket."""
    settings = server() | {"dbname": dbname}
    if user:
        settings |= {"user": user, "password": None}
    return make_conninfo(**{name: value for name, value in settings.items() if value})


def run_sql(dsn: str, *statements: str) -> list[tuple]:
    """Runs the statements in autocommit; the rows of the last one, if it has any."""
    with psycopg.connect(dsn, autocommit=True, connect_timeout=10) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def load_extension(dbname: str, **_: object) -> None:
    run_sql(dsn_of(dbname), "CREATE EXTENSION spectrum")


def load_extension_as_owner(dbname: str, **_: object) -> None:
    run_sql(dsn_of("postgres"), f"ALTER DATABASE {dbname} OWNER TO {OWNER}")
    run_sql(dsn_of(dbname, OWNER), "CREATE EXTENSION spectrum")


# The templates: nothing, Spectrum made by a superuser, Spectrum made by the database's owner.
plain_template = factories.postgresql_noproc(**server(), dbname=TEMPLATES[""])
spectrum_template = factories.postgresql_noproc(
    **server(), dbname=TEMPLATES["spectrum"], load=[load_extension]
)
owner_template = factories.postgresql_noproc(
    **server(), dbname=TEMPLATES["owner"], load=[load_extension_as_owner]
)


@pytest.fixture(scope="session")
def tidy_server() -> Iterator[None]:
    """The server answers, has the extension, and nothing is left of a run that was interrupted."""
    if not os.environ.get("PGHOST"):
        pytest.fail("PGHOST is not set: run the tests by `make test`, or see tests/conftest.py")
    try:
        is_installed = has_extension("spectrum")
    except psycopg.OperationalError as error:
        pytest.fail(f"no server at PGHOST={os.environ['PGHOST']}: {error}")
    if not is_installed:
        pytest.fail("the extension is not installed: make install")
    _drop_leftovers()
    run_sql(dsn_of("postgres"), f"CREATE ROLE {OWNER} LOGIN")
    yield
    _drop_leftovers()


def _drop_leftovers() -> None:
    dsn = dsn_of("postgres")
    for (name,) in run_sql(dsn, "SELECT datname FROM pg_database WHERE datname LIKE 'tests%'"):
        run_sql(
            dsn,
            f'ALTER DATABASE "{name}" IS_TEMPLATE false',
            f'DROP DATABASE "{name}" WITH (FORCE)',
        )
    of_tests = f"SELECT rolname FROM pg_roles WHERE starts_with(rolname, '{ROLE_PREFIX}')"
    for (name,) in run_sql(dsn, of_tests):
        run_sql(dsn, f'DROP ROLE "{name}"')


@contextmanager
def copied(source: NoopExecutor, name: str) -> Iterator[str]:
    """DSN, as its owner, of a new database `tests_<name>`: a copy of a template."""
    janitor = DatabaseJanitor(
        host=source.host,
        port=source.port,
        user=source.user,
        password=source.password,
        dbname=f"tests_{name}",
        template_dbname=source.template_dbname,
    )
    is_owned = source.template_dbname.startswith(TEMPLATES["owner"])
    with janitor:
        if is_owned:
            run_sql(dsn_of("postgres"), f'ALTER DATABASE "{janitor.dbname}" OWNER TO {OWNER}')
        yield dsn_of(janitor.dbname, OWNER if is_owned else None)


@pytest.fixture
def make_db(request: pytest.FixtureRequest, tidy_server: None) -> Iterator[MakeDb]:
    """make_db(name, template): DSN of a new database `tests_<name>`, dropped after the test.

    The template is "spectrum" (the default), "owner" or "" for an empty database.
    """
    with ExitStack() as databases:

        def make(name: str, template: str = "spectrum") -> str:
            source = request.getfixturevalue(f"{template or 'plain'}_template")
            return databases.enter_context(copied(source, name))

        yield make


@pytest.fixture
def dsn(make_db: MakeDb) -> str:
    """DSN of the test's own database, which holds Spectrum."""
    return make_db("db")


@pytest.fixture
def plain_dsn(make_db: MakeDb) -> str:
    """DSN of an empty database."""
    return make_db("plain", template="")


@pytest.fixture
def owner_dsn(make_db: MakeDb) -> str:
    """DSN, as its owner who is no superuser, of a database in which he created Spectrum."""
    return make_db("owned", template="owner")


@pytest.fixture
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """connect(dsn): a further connection, in autocommit; without a DSN to the test's database."""
    with ExitStack() as connections:

        def make(dsn: str | None = None, **settings: object) -> psycopg.Connection:
            dsn = dsn or request.getfixturevalue("dsn")
            settings = {"autocommit": True} | settings
            return connections.enter_context(psycopg.connect(dsn, **settings))

        yield make


@pytest.fixture
def db(dsn: str, connect: Connect) -> psycopg.Connection:
    """A connection to the test's own database, which holds Spectrum."""
    return connect(dsn)


@pytest.fixture
def owner_db(owner_dsn: str, connect: Connect) -> psycopg.Connection:
    """The same as the database's owner, who is no superuser and who created Spectrum."""
    return connect(owner_dsn)


@pytest.fixture(scope="session")
def make_role(tidy_server: None) -> MakeRole:
    """make_role(name): a new role that may log in; it goes at the end of the session."""
    made = 0

    def make(name: str = "role") -> str:
        nonlocal made
        made += 1
        role = f"{ROLE_PREFIX}{name}_{made}"
        run_sql(dsn_of("postgres"), f'CREATE ROLE "{role}" LOGIN')
        return role

    return make


def has_extension(name: str) -> bool:
    """Whether it can be created on this server: those of other versions come without some."""
    query = f"SELECT count(*) FROM pg_available_extensions WHERE name = '{name}'"
    return run_sql(dsn_of("postgres"), query) == [(1,)]


def need_extension(name: str) -> None:
    if not has_extension(name):
        pytest.skip(f"this server has no {name}")


@pytest.fixture
def cron_dsn(tidy_server: None) -> Iterator[str]:
    """DSN of the one database that pg_cron lives in, with Spectrum in it: shared, so it is
    emptied before and after."""
    need_extension("pg_cron")
    dsn = dsn_of("postgres")
    _empty_cron_database(dsn)
    run_sql(dsn, "CREATE EXTENSION spectrum")
    yield dsn
    _empty_cron_database(dsn)


@pytest.fixture
def cron_db(cron_dsn: str, connect: Connect) -> psycopg.Connection:
    return connect(cron_dsn)


def _empty_cron_database(dsn: str) -> None:
    run_sql(
        dsn,
        # pg_cron itself stays, outside of the schemas that go.
        "CREATE EXTENSION IF NOT EXISTS pg_cron SCHEMA pg_catalog",
        "SELECT cron.unschedule(jobid) FROM cron.job",
        # A running job keeps others from starting. Not the launcher: it would not come back.
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND backend_type = 'pg_cron'",
        "TRUNCATE cron.job_run_details",
        "DROP EXTENSION IF EXISTS spectrum CASCADE",
        "DROP SCHEMA IF EXISTS analytics, warehouse, spectrum, public CASCADE",
        "CREATE SCHEMA public AUTHORIZATION pg_database_owner",
        "GRANT USAGE ON SCHEMA public TO PUBLIC",
    )


@pytest.fixture(scope="session")
def private_server(tidy_server: None) -> Iterator[Server]:
    """A server of its own for what may not be done to the one of all tests."""
    with Server(wal_segment_megabytes=1) as server:
        make_template(server)
        yield server


@pytest.fixture(scope="session")
def month_dsn(tidy_server: None, spectrum_template: NoopExecutor) -> Iterator[str]:
    """DSN of a database that holds the demo's month, processed and refreshed: to be read only."""
    with copied(spectrum_template, "month") as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            yesterday = datetime.now(UTC).date() - timedelta(days=1)
            demo.define(connection)
            demo.load(connection, Console(quiet=True), make_month(yesterday).rows)
            connection.execute("CALL spectrum.run()")
        yield dsn


@pytest.fixture(scope="session")
def crowd_dsn(tidy_server: None, owner_template: NoopExecutor) -> Iterator[str]:
    """DSN, as the owner, of a database with two accounts: no test changes what is in it."""
    with copied(owner_template, "crowd") as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            fill(connection, OWN_EVENTS, OTHER_EVENTS, NOBODYS)
        yield dsn


@pytest.fixture
def party(crowd_dsn: str, connect: Connect, make_role: MakeRole) -> Party:
    return Party(crowd_dsn, connect, make_role)


@pytest.fixture
def tenant(party: Party) -> psycopg.Connection:
    return party.role(f"grant_tenant({{}}, '{OWN}')")[1]
