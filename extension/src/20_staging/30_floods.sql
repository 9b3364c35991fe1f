-- Room 20, floods: one account's flood does not stop the events of others. Where more rows wait
-- than a batch takes, and most of the next ones are of one account, claims pass over that account's
-- rows: the head moves on to what others sent, and spectrum.floods notes where each account's rows
-- were left. Half of a batch is for those in front, half for what was left behind, and each half
-- takes what the other does not need: so batches are as full as ever.
--
-- To pass over a row writes nothing: it stays pending in raw_events. The rows left lie between
-- safe_seq and head_seq of spectrum.intake, where the last sweep finds them even if spectrum.floods
-- were lost: like the marks of intake its rows are hints.

CREATE FUNCTION spectrum._create_floods()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.floods') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.floods (
        account_id text COLLATE "C" NOT NULL CONSTRAINT floods_pkey PRIMARY KEY,
        next_seq bigint NOT NULL,
        end_seq bigint NOT NULL,
        waiting bigint NOT NULL,
        begun_at timestamptz NOT NULL DEFAULT now(),
        served_at timestamptz
    ) WITH (
        fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000
    );
    COMMENT ON TABLE spectrum.floods IS
        'Accounts of which so many events wait that batches pass over them, in part: one row each. '
        'Hints only, like spectrum.intake.';
    COMMENT ON COLUMN spectrum.floods.account_id IS 'As in spectrum.waiting.';
    COMMENT ON COLUMN spectrum.floods.next_seq IS 'Where the first of its rows was left.';
    COMMENT ON COLUMN spectrum.floods.end_seq IS 'After the last one that was passed over.';
    COMMENT ON COLUMN spectrum.floods.waiting IS
        'About how many of its rows were passed over and not taken since.';
    COMMENT ON COLUMN spectrum.floods.begun_at IS 'When it was noticed.';
    COMMENT ON COLUMN spectrum.floods.served_at IS 'The last batch that took some of them.';

    -- spectrum._pii_hash() as it stands: a call costs four times as much.
    CREATE VIEW spectrum.waiting AS
    SELECT
        raw.seq,
        left(coalesce(
            CASE (SELECT rule.rule FROM spectrum.pii_rules AS rule WHERE rule.field = 'account_id')
                WHEN 'drop' THEN NULL
                WHEN 'hmac' THEN CASE WHEN 'account_id' = ANY (raw.treated)
                    THEN raw.payload ->> 'account_id'
                    ELSE encode(sha256(
                        (SELECT known.outer_pad FROM spectrum.pii_key AS known)
                        || sha256((SELECT known.inner_pad FROM spectrum.pii_key AS known)
                        || convert_to(nullif(raw.payload ->> 'account_id', ''), 'UTF8'))), 'hex')
                END
                ELSE raw.payload ->> 'account_id'
            END, ''), 200) COLLATE "C" AS account_id,
        pg_column_size(raw.payload) AS bytes
    FROM @extschema@.raw_events AS raw
    WHERE raw.status = 'pending';
    COMMENT ON VIEW spectrum.waiting IS
        'Raw events that are pending, and whose they are. To read all of it costs a look at each.';
    COMMENT ON COLUMN spectrum.waiting.seq IS 'raw_events.seq.';
    COMMENT ON COLUMN spectrum.waiting.account_id IS
        'As a PII rule leaves it, else as sent; empty where there is none.';
    COMMENT ON COLUMN spectrum.waiting.bytes IS 'Of the payload as stored.';
END
$$;
COMMENT ON FUNCTION spectrum._create_floods() IS
    'Room 20: makes spectrum.floods and spectrum.waiting.';

CREATE FUNCTION spectrum._sense_flood(
    p_limit integer,
    OUT is_flooded boolean,
    OUT rows_to_look integer
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
AS $$
DECLARE
    v_head bigint := (SELECT intake.head_seq FROM spectrum.intake);
    v_share numeric := (SELECT config.account_share FROM spectrum.config);
    v_samples integer := least(100, greatest(10, p_limit / 50));
    r_sample record;
BEGIN
    is_flooded := EXISTS (SELECT FROM spectrum.floods);
    IF NOT is_flooded AND (v_share = 1 OR NOT EXISTS (
        SELECT FROM @extschema@.raw_events AS raw WHERE raw.seq >= v_head + p_limit
    )) THEN
        RETURN;
    END IF;

    SELECT
        max(owner.events) > v_share * sum(owner.events) AS is_flooded,
        coalesce(sum(owner.events) FILTER (WHERE NOT owner.is_known
            AND owner.events <= v_share * owner.all_events), 0) / sum(owner.events) AS others,
        sum(owner.bytes) / sum(owner.events) AS bytes
    INTO r_sample
    FROM (
        SELECT count(*) AS events, sum(count(*)) OVER () AS all_events,
            sum(waiting.bytes) AS bytes,
            EXISTS (SELECT FROM spectrum.floods WHERE floods.account_id = waiting.account_id)
                AS is_known
        FROM spectrum.waiting
        WHERE waiting.seq = ANY (ARRAY(
            SELECT v_head + p_limit::bigint * n / v_samples
            FROM generate_series(0, v_samples - 1) AS n
        ))
        GROUP BY waiting.account_id
    ) AS owner;
    is_flooded := is_flooded OR coalesce(r_sample.is_flooded, false);
    -- As far as it takes to find enough in front; not so far that it costs more than the batch.
    rows_to_look := least(10::bigint * p_limit, greatest(
        p_limit,
        least(p_limit / greatest(r_sample.others, 0.1), 64e6 / greatest(r_sample.bytes, 1))
    ));
END
$$;
COMMENT ON FUNCTION spectrum._sense_flood(integer) IS
    'Whether claims have to pass over rows of an account, by a sample of the next p_limit rows '
    'where more than these wait; and how many rows to look at for others.';

CREATE FUNCTION spectrum._claim_named(p_seqs bigint[])
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
AS $$
DECLARE
    v_rows tid[];
BEGIN
    SELECT array_agg(claimed.row_id) INTO v_rows
    FROM (
        SELECT raw.ctid AS row_id FROM @extschema@.raw_events AS raw
        WHERE raw.seq = ANY (p_seqs) AND raw.status = 'pending'
        FOR UPDATE SKIP LOCKED
    ) AS claimed;
    RETURN coalesce(v_rows, '{}'::tid[]);
END
$$;
COMMENT ON FUNCTION spectrum._claim_named(bigint[]) IS 'Locks rows of raw_events that are pending.';

CREATE FUNCTION spectrum._claim_in_front(p_limit integer, p_look integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
DECLARE
    v_share numeric := (SELECT config.account_share FROM spectrum.config);
    v_front integer := p_limit - floor(p_limit * v_share);
    v_writers text[] := spectrum._writers();
    v_from bigint;
    v_stop bigint;
    v_seqs bigint[];
    r_intake record;
BEGIN
    SELECT intake.head_seq, intake.safe_seq, intake.seen_seq, intake.late_seq,
        intake.seen_writers IS NOT NULL AS is_noted,
        coalesce(NOT intake.seen_writers && v_writers, false) AS is_clear
    INTO r_intake FROM spectrum.intake;
    -- From a little behind the head on, for what was committed late.
    v_from := greatest(r_intake.safe_seq, CASE WHEN EXISTS (SELECT FROM spectrum.floods)
        THEN greatest(r_intake.late_seq, r_intake.head_seq - p_look / 2)
        ELSE r_intake.head_seq - p_limit END);

    WITH waiting AS (
        SELECT waiting.seq, waiting.account_id FROM spectrum.waiting
        WHERE waiting.seq >= v_from
        ORDER BY waiting.seq
        LIMIT p_look
    ), owners AS MATERIALIZED (
        SELECT waiting.account_id, array_agg(waiting.seq) AS seqs,
            min(waiting.seq) AS first_seq, max(waiting.seq) AS last_seq,
            count(*) > p_limit * v_share OR EXISTS (
                SELECT FROM spectrum.floods WHERE floods.account_id = waiting.account_id
            ) AS is_flood
        FROM waiting
        GROUP BY waiting.account_id
    ), in_front AS MATERIALIZED (
        SELECT event.seq
        FROM owners CROSS JOIN LATERAL unnest(owners.seqs) AS event (seq)
        WHERE NOT owners.is_flood
        ORDER BY event.seq
        LIMIT v_front
    ), looked AS MATERIALIZED (
        SELECT CASE WHEN count(*) = v_front THEN max(in_front.seq)
            ELSE (SELECT max(owners.last_seq) FROM owners) END AS last_seq
        FROM in_front
    ), left_behind AS (
        INSERT INTO spectrum.floods (account_id, next_seq, end_seq, waiting)
        SELECT owners.account_id, owners.first_seq, least(owners.last_seq, looked.last_seq) + 1,
            CASE
                WHEN owners.first_seq >= r_intake.head_seq AND owners.last_seq <= looked.last_seq
                    THEN cardinality(owners.seqs)
                ELSE (SELECT count(*) FROM unnest(owners.seqs) AS event (seq)
                    WHERE event.seq BETWEEN r_intake.head_seq AND looked.last_seq)
            END
        FROM owners CROSS JOIN looked
        WHERE owners.is_flood AND owners.first_seq <= looked.last_seq
        ON CONFLICT (account_id) DO UPDATE SET
            end_seq = greatest(floods.end_seq, excluded.end_seq),
            waiting = floods.waiting + excluded.waiting
    )
    SELECT looked.last_seq, ARRAY(SELECT in_front.seq FROM in_front) INTO v_stop, v_seqs
    FROM looked;

    IF v_stop IS NULL THEN
        RETURN '{}'::tid[];
    END IF;
    -- What lay below seen_seq is visible since all who were writing then have ended, and was
    -- looked at now.
    UPDATE spectrum.intake
    SET head_seq = greatest(intake.head_seq, v_stop + 1),
        late_seq = CASE
            WHEN v_writers = '{}' THEN v_stop + 1
            WHEN r_intake.is_clear THEN greatest(v_from, least(intake.seen_seq, v_stop + 1))
            ELSE v_from
        END;
    IF r_intake.is_clear OR NOT r_intake.is_noted OR r_intake.seen_seq < v_from THEN
        UPDATE spectrum.intake SET seen_seq = intake.head_seq, seen_writers = spectrum._writers();
    END IF;
    RETURN spectrum._claim_named(v_seqs);
END
$$;
COMMENT ON FUNCTION spectrum._claim_in_front(integer, integer) IS
    'Looks at the next p_look pending rows, locks those of accounts within their share, up to what '
    'a batch of p_limit has for them, and notes the others as left behind.';

CREATE FUNCTION spectrum._claim_left_behind(p_limit integer, p_is_keeper boolean)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rows tid[] := '{}'::tid[];
    v_wanted integer;
    r_flood record;
    r_claim record;
BEGIN
    FOR r_flood IN
        SELECT floods.account_id, floods.next_seq, floods.end_seq,
            count(*) OVER () + 1 - row_number() OVER (
                ORDER BY floods.served_at NULLS FIRST, floods.next_seq
            ) AS still_to_serve
        FROM spectrum.floods
        ORDER BY still_to_serve DESC
    LOOP
        v_wanted := ceil((p_limit - cardinality(v_rows))::numeric / r_flood.still_to_serve);
        EXIT WHEN v_wanted = 0;
        r_claim := spectrum._claim_between(
            r_flood.next_seq, r_flood.end_seq, v_wanted, r_flood.account_id
        );
        v_rows := v_rows || r_claim.row_ids;
        IF p_is_keeper AND cardinality(r_claim.row_ids) < v_wanted THEN
            DELETE FROM spectrum.floods WHERE floods.account_id = r_flood.account_id;
        ELSIF p_is_keeper THEN
            UPDATE spectrum.floods
            SET next_seq = r_claim.last_seq + 1,
                waiting = greatest(floods.waiting - v_wanted, 0),
                served_at = clock_timestamp()
            WHERE floods.account_id = r_flood.account_id;
        END IF;
    END LOOP;
    RETURN v_rows;
END
$$;
COMMENT ON FUNCTION spectrum._claim_left_behind(integer, boolean) IS
    'Locks rows that were left behind, of each account as many, in the order of receipt; only the '
    'keeper of the marks moves them.';

CREATE FUNCTION spectrum._claim_fairly(p_limit integer)
RETURNS tid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rows tid[];
    v_before integer;
    r_sense record;
BEGIN
    -- Under a snapshot that is older than the statement, the marks cannot be moved safely.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RETURN '{}'::tid[];
    END IF;
    r_sense := spectrum._sense_flood(p_limit);
    IF NOT r_sense.is_flooded THEN
        RETURN '{}'::tid[];
    END IF;
    -- One worker at a time keeps the marks; others take what comes, and never wait for him.
    PERFORM FROM spectrum.intake FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN '{}'::tid[];
    END IF;
    v_rows := spectrum._claim_in_front(p_limit, r_sense.rows_to_look);
    LOOP
        v_before := cardinality(v_rows);
        v_rows := v_rows || spectrum._claim_left_behind(p_limit - v_before, true);
        EXIT WHEN cardinality(v_rows) IN (v_before, p_limit);
    END LOOP;
    RETURN v_rows;
END
$$;
COMMENT ON FUNCTION spectrum._claim_fairly(integer) IS
    'During the flood of an account: locks rows of others in front of it and of what was left '
    'behind; nothing where there is none, or another worker is at it.';
