-- Room 72, glass: from any cell of a standing view to the events behind it, and from an event to
-- the cells it counts in. For each view there are two functions, found by their names:
--   analytics._trace_<view>(cell)           the events that a cell counts, and the rule in words
--   analytics._cells_<view>(user, at, event)  the cells that count an event
-- Both ask the events as they are now. A view is behind them by what no refresh has counted yet.

CREATE FUNCTION analytics._read_cell(
    p_cell jsonb, p_keys text[], p_measures text[], p_optional text[] DEFAULT '{}'
)
RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_cell jsonb;
    v_form text := format('a JSON object with %s, and if wanted account_id%s and measure',
        array_to_string(p_keys, ', '), array_to_string(ARRAY[''] || p_optional, ', '));
    v_missing text[];
BEGIN
    IF p_cell IS NULL OR jsonb_typeof(p_cell) <> 'object' THEN
        PERFORM spectrum._reject('p_cell', p_cell::text, v_form);
    END IF;
    v_cell := jsonb_build_object('account_id', '*', 'measure', p_measures[1])
        || jsonb_strip_nulls(p_cell);
    v_missing := ARRAY(SELECT k.key FROM unnest(p_keys) AS k (key) WHERE NOT v_cell ? k.key);
    IF v_missing <> '{}' OR v_cell - p_keys - p_optional - '{account_id, measure}'::text[] <> '{}'
    THEN
        PERFORM spectrum._reject('p_cell', p_cell::text, v_form);
    END IF;
    PERFORM spectrum._check_choice('p_cell.measure', v_cell ->> 'measure', p_measures);
    RETURN v_cell;
END
$$;
COMMENT ON FUNCTION analytics._read_cell(jsonb, text[], text[], text[]) IS
    'A cell with what it leaves out: all accounts, the first measure. Raises 22023 unless it has '
    'the keys, and no others but optional ones.';

CREATE FUNCTION analytics._cell_day(p_cell jsonb, p_key text)
RETURNS date
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO'
AS $$
DECLARE
    v_day date;
BEGIN
    IF p_cell ->> p_key ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}$' THEN
        v_day := (p_cell ->> p_key)::date;
    ELSE
        PERFORM spectrum._reject('p_cell.' || p_key, p_cell ->> p_key, 'a day, such as 2026-03-01');
    END IF;
    RETURN v_day;
EXCEPTION WHEN datetime_field_overflow THEN
    PERFORM spectrum._reject('p_cell.' || p_key, p_cell ->> p_key, 'a day, such as 2026-03-01');
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION analytics._cell_day(jsonb, text) IS
    'The day that a key of a cell names; raises 22023 unless it is one.';

CREATE FUNCTION analytics._cell_number(p_cell jsonb, p_key text)
RETURNS integer
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT p_cell ->> p_key ~ '^[0-9]{1,9}$' THEN
        PERFORM spectrum._reject('p_cell.' || p_key, p_cell ->> p_key, 'a number from 0 on');
    END IF;
    RETURN (p_cell ->> p_key)::integer;
END
$$;
COMMENT ON FUNCTION analytics._cell_number(jsonb, text) IS
    'The number that a key of a cell names; raises 22023 unless it is one.';

CREATE FUNCTION analytics._cell_account(p_cell jsonb)
RETURNS bigint
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE p_cell ->> 'account_id' WHEN '*' THEN 0 ELSE coalesce((
        SELECT known.account_key FROM analytics.accounts AS known
        WHERE known.account_id = p_cell ->> 'account_id'
    ), -1) END;
END
$$;
COMMENT ON FUNCTION analytics._cell_account(jsonb) IS
    'Key of the account of a cell: 0 for all together, -1 for one never seen.';

CREATE FUNCTION analytics._cell_scope(p_cell jsonb)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE p_cell ->> 'account_id' WHEN '*' THEN '' ELSE
        format(' of account %s', p_cell ->> 'account_id')
    END;
END
$$;
COMMENT ON FUNCTION analytics._cell_scope(jsonb) IS
    'Whose events a cell counts, for its rule: nothing, or " of account ...".';

CREATE FUNCTION analytics._days_between(
    p_first date, p_last date, OUT since timestamptz, OUT until timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT spectrum._day_start(p_first, setting.timezone),
        spectrum._day_start(p_last + 1, setting.timezone)
    INTO since, until
    FROM analytics.settings AS setting;
END
$$;
COMMENT ON FUNCTION analytics._days_between(date, date) IS
    'When the days from p_first to p_last begin and end, in the time zone of reports.';

CREATE FUNCTION analytics._day_of(p_at timestamptz)
RETURNS date
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.period_date(spectrum.period_start('day', p_at));
END
$$;
COMMENT ON FUNCTION analytics._day_of(timestamptz) IS
    'The calendar day that holds an instant, in the time zone of reports.';

CREATE FUNCTION analytics._event_accounts(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (account_id text, account_key bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 2
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT '*', 0::bigint
    UNION ALL
    SELECT event.account_id, event.account_key
    FROM analytics.events AS event
    WHERE event.user_key = p_user AND event.occurred_at = p_at AND event.event_id = p_event
        AND event.account_key <> 0;
END
$$;
COMMENT ON FUNCTION analytics._event_accounts(bigint, timestamptz, uuid) IS
    'The scopes that an event counts in: all accounts together (*, 0), and its own.';

CREATE FUNCTION analytics._sees_raw_events()
RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN has_schema_privilege('warehouse', 'USAGE')
        AND has_table_privilege('warehouse.event_ledger', 'SELECT')
        AND has_schema_privilege('@extschema@', 'USAGE')
        AND has_table_privilege('@extschema@.raw_events', 'SELECT');
END
$$;
COMMENT ON FUNCTION analytics._sees_raw_events() IS
    'Whether the caller may read raw_events, and the ledger that leads there.';

CREATE FUNCTION analytics.trace(p_view text, p_cell jsonb, p_limit integer DEFAULT 1000)
RETURNS TABLE (
    rule text,
    unit text,
    amount numeric,
    user_id text,
    event_id uuid,
    occurred_at timestamptz,
    event_type text,
    raw_id uuid
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    v_sees_raw boolean := analytics._sees_raw_events();
    v_facts_from timestamptz;
BEGIN
    IF p_view IS NULL
        OR to_regprocedure(format('analytics.%I(jsonb)', '_trace_' || p_view)) IS NULL
    THEN
        PERFORM spectrum._check_choice('p_view', p_view, ARRAY(
            SELECT substr(routine.proname, 8) FROM pg_proc AS routine
            WHERE routine.pronamespace = 'analytics'::regnamespace
                AND routine.proname LIKE '\_trace\_%'
            ORDER BY routine.proname
        ));
    ELSIF p_limit < 0 THEN
        PERFORM spectrum._reject('p_limit', p_limit::text, 'a number of rows, or NULL for all');
    END IF;
    SELECT s.facts_from INTO v_facts_from FROM analytics.settings AS s;
    IF v_facts_from IS NOT NULL THEN
        RAISE NOTICE 'events before % are purged: what a cell counts of them is frozen, and cannot '
            'be listed', v_facts_from;
    END IF;
    RETURN QUERY EXECUTE format(
        'SELECT found.rule, coalesce(found.unit, event.user_id), found.amount, event.user_id, '
        'found.event_id, found.occurred_at, event.event_type, %s '
        'FROM (SELECT * FROM analytics.%I($1) ORDER BY occurred_at, event_id LIMIT $2) AS found '
        'JOIN analytics.events AS event ON event.user_key = found.user_key '
        'AND event.occurred_at = found.occurred_at AND event.event_id = found.event_id %s '
        'ORDER BY found.occurred_at, found.event_id, found.unit',
        CASE WHEN v_sees_raw THEN 'raw.id' ELSE 'NULL::uuid' END,
        '_trace_' || p_view,
        CASE WHEN v_sees_raw THEN
            'LEFT JOIN warehouse.event_ledger AS ledger ON ledger.event_id = found.event_id '
            'LEFT JOIN @extschema@.raw_events AS raw ON raw.seq = ledger.seq '
        END)
    USING p_cell, p_limit;
END
$$;
COMMENT ON FUNCTION analytics.trace(text, jsonb, integer) IS
    'The events that a cell of a standing view counts, in the order of time, at most p_limit '
    '(NULL: all), and the rule that counts them. p_view: active_users; p_cell: the columns that '
    'name the row, and measure where it has several numbers: {"account_id": "*", "day": '
    '"2026-03-01", "measure": "wau"}. unit: what the event makes count (a user, the event itself, '
    '...): the number of distinct units is the cell. amount: its share, where the cell is a sum. '
    'raw_id: row of raw_events, for roles that may read that.';
