-- Room 72, explain: all that is known of one event, from its raw row to each cell it counts in.

CREATE FUNCTION spectrum._find_raw_event(p_event_id uuid, OUT raw_seq bigint, OUT fact_id uuid)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT ledger.seq, ledger.event_id INTO raw_seq, fact_id
    FROM warehouse.event_ledger AS ledger
    WHERE ledger.event_id = p_event_id;
    IF FOUND THEN
        RETURN;
    END IF;
    -- Not an event that counts: perhaps a raw row, one that failed or repeats another.
    SELECT raw.seq, ledger.event_id INTO raw_seq, fact_id
    FROM @extschema@.raw_events AS raw
    LEFT JOIN @extschema@.raw_events AS first_row ON first_row.id = raw.copy_of
    LEFT JOIN spectrum.readings AS reading ON reading.seq = coalesce(first_row.seq, raw.seq)
    LEFT JOIN warehouse.event_ledger AS ledger
        ON ledger.event_id = reading.event_id AND ledger.seq = reading.seq
    WHERE raw.id = p_event_id;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_event_id', p_event_id::text,
            'the event_id of an event that counts, or the id of a row of raw_events');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._find_raw_event(uuid) IS
    'The raw row of an event, given by its event_id or by the row''s id, and, if it or the row it '
    'repeats counts, the event_id that it counts as; raises 22023 where there is none.';

CREATE FUNCTION spectrum.explain_event(p_event_id uuid)
RETURNS TABLE (what text, view_name text, cell jsonb, rule text, detail jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    r_found record := spectrum._find_raw_event(p_event_id);
    r_fact record;
    r_view record;
BEGIN
    RETURN QUERY
    SELECT CASE WHEN raw.seq = r_found.raw_seq THEN 'raw event' ELSE 'copy' END,
        NULL::text, NULL::jsonb,
        CASE
            WHEN raw.status = 'failed' THEN 'It cannot be read, so it counts nowhere.'
            WHEN raw.status <> 'done' THEN 'It waits to be processed.'
            WHEN raw.copy_of IS NOT NULL THEN 'It repeats an event_id: the first row received '
                'counts, this one changes no number.'
            ELSE 'It is the first row received with its event_id, so it counts.'
        END,
        jsonb_strip_nulls(to_jsonb(raw) - 'next_attempt_at')
    FROM @extschema@.raw_events AS raw
    WHERE raw.seq = r_found.raw_seq
        OR raw.copy_of = (
            SELECT first_row.id FROM @extschema@.raw_events AS first_row
            WHERE first_row.seq = r_found.raw_seq
        )
    ORDER BY raw.seq;

    PERFORM spectrum._read_packed_of(ledger.user_key::text)
    FROM warehouse.event_ledger AS ledger
    WHERE ledger.event_id = r_found.fact_id;
    SELECT event.* INTO r_fact
    FROM warehouse.event_ledger AS ledger
    JOIN analytics.events AS event ON event.user_key = ledger.user_key
        AND event.occurred_at = ledger.occurred_at AND event.event_id = ledger.event_id
    WHERE ledger.event_id = r_found.fact_id;
    IF NOT FOUND THEN
        PERFORM spectrum._read_packed_of(NULL);
        RETURN QUERY
        SELECT 'fact', NULL::text, NULL::jsonb,
            'It is purged. The standing views that counted it do so still, as it was: frozen.',
            jsonb_build_object('event_id', ledger.event_id, 'occurred_at', ledger.occurred_at)
        FROM warehouse.event_ledger AS ledger
        WHERE ledger.event_id = r_found.fact_id AND ledger.occurred_at < spectrum._readable_from();
        RETURN;
    END IF;
    RETURN QUERY
    SELECT 'fact', NULL::text, NULL::jsonb, 'What all questions are asked of.',
        jsonb_strip_nulls(to_jsonb(r_fact));

    RETURN QUERY
    SELECT 'session', NULL::text, NULL::jsonb,
        'A session ends after 30 minutes without an event of its user, or after 24 hours.',
        jsonb_strip_nulls(to_jsonb(s) - '{scope, user_key, user_id, steps}'::text[])
    FROM analytics._sessions(
        NULL, NULL, ARRAY[r_fact.user_key], '{0}', '{-infinity}', '{infinity}', NULL,
        '{pages, touches, places}'
    ) AS s
    WHERE r_fact.user_key <> 0 AND r_fact.occurred_at BETWEEN s.started_at AND s.ended_at;

    FOR r_view IN
        SELECT view.name, kind.kind IN ('funnel', 'mrr') AS is_of_accounts
        FROM spectrum.report_kinds AS kind
        CROSS JOIN LATERAL unnest(kind.views) WITH ORDINALITY AS view (name, number)
        WHERE to_regprocedure(format(
            'analytics.%I(bigint, timestamptz, uuid)', '_cells_' || view.name)) IS NOT NULL
        ORDER BY kind.position, view.number
    LOOP
        -- What counts accounts reads events of others.
        PERFORM spectrum._read_packed_of(
            CASE WHEN NOT r_view.is_of_accounts THEN r_fact.user_key::text END);
        RETURN QUERY EXECUTE format(
            'SELECT ''cell'', $1, counted.cell, counted.rule, NULL::jsonb '
            'FROM analytics.%I($2, $3, $4) AS counted ORDER BY counted.cell',
            '_cells_' || r_view.name)
        USING r_view.name, r_fact.user_key, r_fact.occurred_at, r_fact.event_id;
    END LOOP;
    PERFORM spectrum._read_packed_of(NULL);
END
$$;
COMMENT ON FUNCTION spectrum.explain_event(uuid) IS
    'What became of an event, given by its event_id or by the id of its raw row: the raw row '
    '(detail: status, seq, payload, ...) and its copies, the fact, its session, and each cell of '
    'a standing view that counts it, with the rule. A cell as it stands here can be given to '
    'analytics.trace(view_name, cell).';
