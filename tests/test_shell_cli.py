"""The command `spectrum` around its calls: installing, status, pg_cron, pg_regress, errors."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest
from conftest import Connect, MakeRole
from psycopg.conninfo import make_conninfo
from shell_command import COMMAND, invoke, run
from spectrum_shell import operations, render
from spectrum_shell.errors import one_line


class TestInstall:
    def test_once_and_again(self, plain_dsn: str, connect: Connect) -> None:
        first = invoke("install", "--dsn", plain_dsn)
        assert (first.code, first.err) == (0, "")
        assert first.out == (
            'Installed Spectrum in database "tests_plain": events go into public.raw_events\n'
        )
        again = invoke("install", "--dsn", plain_dsn)
        assert (again.code, again.err) == (0, "")
        assert "is installed in database" in again.out and "already" in again.out
        db = connect(plain_dsn)
        assert db.execute("SELECT count(*) FROM public.raw_events").fetchone() == (0,)

    def test_it_cannot_move(self, dsn: str) -> None:
        outcome = invoke("install", "--schema", "elsewhere", "--dsn", dsn)
        assert outcome.code == 1 and 'raw_events in schema "public"' in outcome.error_line

    def test_a_schema_must_exist(self, plain_dsn: str) -> None:
        outcome = invoke("install", "--schema", "nowhere", "--dsn", plain_dsn)
        assert outcome.code == 1
        assert 'there is no schema "nowhere"' in outcome.error_line
        assert "SQLSTATE 3F000" in outcome.error_line

    def test_files_that_are_not_on_the_server(
        self, plain_dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(operations, "_CREATE", "CREATE EXTENSION spectrum_of_nowhere")
        outcome = invoke("install", "--dsn", plain_dsn)
        assert outcome.code == 3
        assert "files are not on the server" in outcome.error_line
        assert "make install" in outcome.error_line


class TestStatus:
    def test_as_a_table(self, dsn: str, db: psycopg.Connection) -> None:
        db.execute('INSERT INTO raw_events (payload) VALUES (\'{"event_type": "visit"}\')')
        outcome = invoke("status", "--dsn", dsn)
        assert (outcome.code, outcome.err) == (0, "")
        lines = [line.strip("│").split("│") for line in outcome.out.splitlines()]
        assert ["pending", "1"] in [[cell.strip() for cell in line] for line in lines]
        assert "Health" in outcome.out

    def test_as_json(self, dsn: str, db: psycopg.Connection) -> None:
        document = json.loads(invoke("status", "--json", "--dsn", dsn).out)
        assert document["status"]["pending"] == 0
        names = [row[0] for row in db.execute("SELECT check_name FROM spectrum.health()")]
        assert [check["check_name"] for check in document["health"]] == names

    def test_check_gives_health_as_the_exit_code(self, dsn: str, db: psycopg.Connection) -> None:
        ok = db.execute("SELECT bool_and(ok) FROM spectrum.health()").fetchone()
        assert ok == (False,)  # it never ran
        assert invoke("status", "--check", "--dsn", dsn).code == 1

    def test_values_as_a_person_reads_them(self) -> None:
        shown = {
            None: "-",
            1234567: "1,234,567",
            Decimal("1.50"): "1.50",
            3600.12345: "3,600.123",
            timedelta(seconds=0.25): "0.2 s",
            timedelta(seconds=320): "5 min 20 s",
            timedelta(days=3, hours=4, minutes=5): "3 d 4 h",
            timedelta(days=-1): "-1 d",
            timedelta(hours=2): "2 h",
            datetime(2024, 5, 1, 10, 0, 0, 123456, tzinfo=UTC): "2024-05-01 10:00:00+00:00",
            ("a", 2): "a, 2",
            "two\nlines": "two lines",
        }
        assert {value: render.format_value(value) for value in shown} == shown


class TestSchedule:
    def test_on_and_off(self, cron_dsn: str, cron_db: psycopg.Connection) -> None:
        on = invoke("schedule", "--cron", "*/7 * * * *", "--dsn", cron_dsn)
        assert (on.code, on.err) == (0, "")
        job = cron_db.execute("SELECT jobid, schedule FROM cron.job").fetchone()
        assert on.out == f"Scheduled: pg_cron job {job[0]}, {job[1]}\n"
        bad = invoke("schedule", "--cron", "often", "--dsn", cron_dsn)
        assert bad.code == 1 and "SQLSTATE 22023" in bad.error_line
        assert invoke("unschedule", "--dsn", cron_dsn).out == "Unscheduled\n"
        assert invoke("unschedule", "--dsn", cron_dsn).out == "Nothing was scheduled\n"
        assert cron_db.execute("SELECT count(*) FROM cron.job").fetchone() == (0,)

    @pytest.mark.parametrize("command", ["schedule", "unschedule"])
    def test_pg_cron_lives_elsewhere(self, dsn: str, command: str) -> None:
        outcome = invoke(command, "--dsn", dsn)
        assert outcome.code == 3 and "pg_cron" in outcome.error_line


class TestErrors:
    """One line on standard error that says what to do, and the exit code of the help."""

    def test_codes_are_in_the_help(self) -> None:
        outcome = invoke("--help")
        assert outcome.code == 0
        for code in ("  0 ", "  1 ", "  2 ", "  3 ", "  70 ", "  130 ", "  141 "):
            assert code in outcome.out
        for command in ("demo", "install", "load", "schedule", "status", "test", "track"):
            assert invoke(command, "--help").code == 0

    @pytest.mark.parametrize(
        ("change", "reason", "todo"),
        [
            ({"dbname": "tests_absent"}, 'database "tests_absent" does not exist', "createdb"),
            ({"user": "spectrum_test_absent"}, "spectrum_test_absent", ""),
            ({"host": "/nowhere", "port": "1"}, "No such file", "is the server running"),
            ({"host": "nowhere.invalid"}, "nowhere.invalid", "check the host's name"),
        ],
    )
    def test_no_connection(self, dsn: str, change: dict[str, str], reason: str, todo: str) -> None:
        outcome = invoke("status", "--dsn", make_conninfo(dsn, **change))
        assert outcome.code == 3
        assert reason in outcome.error_line and todo in outcome.error_line

    def test_no_connection_string(self) -> None:
        outcome = invoke("status", "--dsn", "nonsense")
        assert outcome.code == 2 and "is malformed" in outcome.error_line

    @pytest.mark.parametrize("command", ["status", "schedule", "unschedule", "track visit"])
    def test_not_installed(self, plain_dsn: str, command: str) -> None:
        outcome = invoke(*command.split(), "--dsn", plain_dsn)
        assert outcome.code == 3
        assert 'not installed in database "tests_plain"' in outcome.error_line
        assert "spectrum install" in outcome.error_line

    @pytest.mark.parametrize("command", ["status", "track visit"])
    def test_a_right_is_missing(self, dsn: str, make_role: MakeRole, command: str) -> None:
        outcome = invoke(*command.split(), "--dsn", make_conninfo(dsn, user=make_role()))
        assert outcome.code == 3
        assert "permission denied" in outcome.error_line
        assert "SQLSTATE 42501" in outcome.error_line and "grant_" in outcome.error_line

    @pytest.mark.parametrize(
        ("command", "reason"),
        [
            ("frobnicate", "No such command 'frobnicate'"),
            ("status --frobnicate", "--frobnicate"),
            ("load", "Missing argument"),
        ],
    )
    def test_usage(self, command: str, reason: str) -> None:
        outcome = invoke(*command.split())
        assert outcome.code == 2 and reason in outcome.error_line
        assert "--help" in outcome.error_line

    def test_the_database_comes_from_the_environment(self, dsn: str, plain_dsn: str) -> None:
        environment = os.environ | {"SPECTRUM_DSN": dsn, "PGDATABASE": "tests_absent"}
        command = [*COMMAND, "status", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == 0
        del environment["SPECTRUM_DSN"]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == 3 and b"tests_absent" in done.stderr

    def test_a_reader_that_has_gone(self, dsn: str) -> None:
        for option in ("", "--json"):
            pipeline = f"{' '.join(COMMAND)} status {option} --dsn '{dsn}' | true;"
            done = subprocess.run(
                ["bash", "-c", f"{pipeline} exit ${{PIPESTATUS[0]}}"],
                capture_output=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (141, b"")

    def test_a_fault_shows_its_traceback_on_demand_only(
        self, dsn: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(operations, "status", lambda _: {}["absent"])
        outcome = invoke("status", "--dsn", dsn)
        assert outcome.code == 70 and "KeyError" in outcome.error_line
        outcome = invoke("--debug", "status", "--dsn", dsn)
        assert outcome.code == 70 and "Traceback" in outcome.err

    def test_messages_are_one_printable_line(self) -> None:
        assert one_line("a\n\tb\x1b[2J  c\u202e") == "a b [2J c"
        assert len(one_line("x" * 5000)) == 600


class TestRegress:
    """`spectrum test` on a checkout of two tests, one of which fails."""

    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        (tmp_path / "Makefile").write_text(
            "REGRESS = right wrong\n"
            "REGRESS_OPTS = --inputdir=regress\n"
            "PG_CONFIG ?= pg_config\n"
            "PGXS := $(shell $(PG_CONFIG) --pgxs)\n"
            "include $(PGXS)\n"
        )
        for name, shown in (("right", "1"), ("wrong", "2")):
            for folder, text in (
                ("sql", ""),
                ("expected", f" one \n-----\n   {shown}\n(1 row)\n\n"),
            ):
                file = tmp_path / "regress" / folder / f"{name}.{'sql' if not text else 'out'}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("SELECT 1 AS one;\n" + text)
        return tmp_path

    def test_its_exit_code_and_its_differences(self, checkout: Path, dsn: str) -> None:
        right = run("test", "right", "--checkout", checkout, "--dsn", dsn)
        assert (right.code, right.err) == (0, "") and "ok" in right.out
        both = run("test", "--checkout", checkout, "--dsn", dsn)
        assert both.code == 1
        assert "-   2\n+   1\n" in both.out
        assert not (checkout / "results").exists()

    def test_no_test_is_no_success(self, checkout: Path, dsn: str) -> None:
        makefile = checkout / "Makefile"
        makefile.write_text(makefile.read_text().replace("right wrong", ""))
        outcome = invoke("test", "--checkout", checkout, "--dsn", dsn)
        assert outcome.code == 1 and "names no regression test" in outcome.error_line

    def test_no_checkout(self, tmp_path: Path) -> None:
        outcome = invoke("test", "--checkout", tmp_path)
        assert outcome.code == 2 and "there is no checkout" in outcome.error_line
