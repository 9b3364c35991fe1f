"""Negative controls: Spectrum with one protection taken out each. The checker has to notice, or it
proves nothing. The patches are made in the database, after CREATE EXTENSION, by these tests alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from .rounds import Outcome, database, play
from .server import Server

SIGNATURE = """
    CREATE OR REPLACE PROCEDURE spectrum.process_batch(
        p_limit integer DEFAULT NULL, INOUT claimed bigint DEFAULT NULL,
        INOUT loaded bigint DEFAULT NULL, INOUT duplicates bigint DEFAULT NULL,
        INOUT failed bigint DEFAULT NULL
    ) LANGUAGE plpgsql AS $$
"""
# What a queue looks like that marks its rows first, in a transaction of their own.
CLAIM_FIRST = (
    SIGNATURE
    + """
    DECLARE
        v_seqs bigint[];
        v_rows tid[];
    BEGIN
        WITH taken AS (
            UPDATE public.raw_events SET status = '{status}' WHERE seq IN (
                SELECT seq FROM public.raw_events WHERE status = 'pending'
                ORDER BY seq LIMIT p_limit FOR UPDATE SKIP LOCKED
            ) RETURNING seq
        )
        SELECT array_agg(taken.seq) INTO v_seqs FROM taken;
        COMMIT;
        SELECT array_agg(ctid) INTO v_rows FROM public.raw_events WHERE seq = ANY (v_seqs);
        claimed := coalesce(cardinality(v_rows), 0);
        IF claimed > 0 THEN
            SELECT * INTO loaded, duplicates, failed FROM spectrum._load_patiently(v_rows);
            INSERT INTO spectrum.run_log (step, claimed) VALUES ('process', process_batch.claimed);
        END IF;
    END $$
"""
)
# The notes of the workers' batches are kept aside and passed on in a second transaction. The moment
# between the two is made long enough for a fault to meet it in a few rounds.
NEWS_LATER = (
    """
    CREATE TABLE public.kept (LIKE spectrum.news, pid integer DEFAULT pg_backend_pid());
    CREATE FUNCTION public.keep() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF current_setting('application_name') NOT LIKE 'worker%'
            OR current_setting('faults.passes_on', true) = 'yes'
        THEN
            RETURN new;
        END IF;
        INSERT INTO public.kept SELECT new.*;
        RETURN NULL;
    END $$;
    CREATE TRIGGER keep BEFORE INSERT ON spectrum.news
    FOR EACH ROW EXECUTE FUNCTION public.keep();
    """
    + SIGNATURE
    + """
    BEGIN
        SELECT batch.claimed, batch.loaded, batch.duplicates, batch.failed
        INTO claimed, loaded, duplicates, failed
        FROM spectrum._log_batch(NULL, p_limit) AS batch;
        COMMIT;
        PERFORM pg_sleep(0.03);
        PERFORM set_config('faults.passes_on', 'yes', true);
        WITH mine AS (DELETE FROM public.kept WHERE pid = pg_backend_pid() RETURNING *)
        INSERT INTO spectrum.news (note_no, events, first_at, last_at, user_keys, occurred_ats,
            event_ids)
        SELECT note_no, events, first_at, last_at, user_keys, occurred_ats, event_ids FROM mine;
    END $$
"""
)


@dataclass(frozen=True)
class Edit:
    """Of one function: a piece of its text, which is there exactly once, becomes another."""

    function: str
    old: str
    new: str = ""

    def apply(self, db: psycopg.Connection) -> None:
        ((text,),) = db.execute("SELECT pg_get_functiondef(%s::regproc)", (self.function,))
        if text.count(self.old) != 1:
            raise ValueError(f"{self.function} has {text.count(self.old)} times {self.old!r}")
        db.execute(text.replace(self.old, self.new))


@dataclass(frozen=True)
class Control:
    changes: Sequence[str | Edit]
    fault: str = "kill -9 of a worker"
    refreshers: int = 1

    def apply(self, db: psycopg.Connection) -> None:
        for change in self.changes:
            if isinstance(change, Edit):
                change.apply(db)
            else:
                db.execute(change)


CONTROLS = {
    "a claim that commits before the work": Control([CLAIM_FIRST.format(status="processing")]),
    "rows marked done before they are loaded": Control([CLAIM_FIRST.format(status="done")]),
    "a ledger that lets an event in twice": Control(
        [
            "ALTER TABLE warehouse.event_ledger DROP CONSTRAINT event_ledger_pkey",
            "CREATE INDEX ON warehouse.event_ledger (event_id)",
            Edit(
                "spectrum._insert_facts",
                "WHERE NOT EXISTS (\n            SELECT FROM warehouse.event_ledger AS ledger\n"
                "            WHERE ledger.event_id = batch.event_id\n        )",
            ),
        ]
    ),
    "news written after the batch's transaction": Control([NEWS_LATER]),
    "news of small batches lost": Control(
        [Edit("spectrum._insert_facts", "HAVING count(*) > 0", "HAVING count(*) > 2")]
    ),
    "a claim that locks nothing": Control(
        [
            Edit("spectrum._claim_between", "FOR UPDATE SKIP LOCKED"),
            # Time for another worker to take the same rows.
            Edit(
                "spectrum._claim_between",
                "row_ids := coalesce(",
                "PERFORM pg_sleep(0.03); row_ids := coalesce(",
            ),
        ]
    ),
    "refreshes that do not take turns": Control(
        [
            Edit(
                "spectrum._hold_reports",
                "PERFORM pg_advisory_xact_lock(spectrum._lock_key('refresh'));",
                "NULL;",
            )
        ],
        fault="pg_cancel_backend",
        refreshers=3,
    ),
}


def notices(server: Server, name: str, seed: str, rounds: int = 12) -> tuple[bool, str]:
    """Whether some round of a few finds that the protection is gone, and what it says."""
    control = CONTROLS[name]
    with database(server, "faults_control", control.apply) as place:
        for number in range(rounds):
            outcome = play(
                server, place, f"{seed}-control-{number}", control.fault, control.refreshers,
                patience=3,
            )  # fmt: skip
            if not outcome.is_well:
                return True, f"noticed in round {number + 1}: {summary(outcome)}"
    return False, f"NOT NOTICED in {rounds} rounds"


def summary(outcome: Outcome) -> str:
    found = outcome.finding
    counts = {
        "lost": found.lost, "doubled": found.doubled, "left claimed": found.left,
        "views off": found.views,
    }  # fmt: skip
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return ", ".join(parts or [found.wrong[0].splitlines()[0][:120]])
