-- Room 40, news: what changed in the facts, for whoever keeps numbers that follow them (room 50).
-- Each batch leaves, in its own transaction, one row that names the facts it inserted, and one row
-- for each fact it took back, with its content: that can be read nowhere else any more. The
-- numbers of both come from one sequence, drawn while the ledger's rows are locked, so what
-- happened to one event is in the order of the numbers.
--
-- A row a batch, not a row an event: an array element takes 32 bytes of WAL, a row of its own 170
-- with its removal.

CREATE FUNCTION spectrum._create_news()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.news') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.news (
        note_no bigserial NOT NULL CONSTRAINT news_pkey PRIMARY KEY,
        events integer NOT NULL,
        first_at timestamptz NOT NULL,
        last_at timestamptz NOT NULL,
        user_keys bigint[] NOT NULL,
        occurred_ats timestamptz[] NOT NULL,
        event_ids uuid[] NOT NULL
    ) WITH (
        autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100,
        toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 5000
    );
    ALTER TABLE spectrum.news ALTER COLUMN user_keys SET STORAGE EXTERNAL,
        ALTER COLUMN occurred_ats SET STORAGE EXTERNAL, ALTER COLUMN event_ids SET STORAGE EXTERNAL;
    COMMENT ON TABLE spectrum.news IS
        'Facts that no refresh has counted yet, one row a batch. Consumed by the next refresh.';
    COMMENT ON COLUMN spectrum.news.note_no IS
        'Shared with spectrum.withdrawals: the order in which one event came and went.';
    COMMENT ON COLUMN spectrum.news.events IS 'Facts in this row: the length of its arrays.';
    COMMENT ON COLUMN spectrum.news.first_at IS 'Earliest occurred_at among them.';
    COMMENT ON COLUMN spectrum.news.last_at IS 'Latest occurred_at among them.';
    COMMENT ON COLUMN spectrum.news.user_keys IS 'With the same element of the other two arrays: '
        'the key of the fact.';

    CREATE TABLE spectrum.withdrawals (
        note_no bigint NOT NULL,
        event_id uuid NOT NULL,
        occurred_at timestamptz NOT NULL,
        account_key bigint NOT NULL,
        user_key bigint NOT NULL,
        event_type_key integer NOT NULL,
        geo_key integer NOT NULL,
        properties jsonb NOT NULL,
        revenue numeric,
        currency text
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
    COMMENT ON TABLE spectrum.withdrawals IS
        'Facts taken back that refreshes still count, as they were. Consumed by the next refresh.';
    COMMENT ON COLUMN spectrum.withdrawals.note_no IS 'See spectrum.news.';
END
$$;
COMMENT ON FUNCTION spectrum._create_news() IS
    'Room 40: makes spectrum.news and spectrum.withdrawals.';
