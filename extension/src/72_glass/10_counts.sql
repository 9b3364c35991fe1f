-- Room 72, glass of the counts: events, active users, money. What counts in a cell is what happened
-- in its days.

CREATE FUNCTION analytics._trace_daily_events(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{day, event_type}', '{events}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_account bigint := analytics._cell_account(v_cell);
    v_type integer := analytics._event_key(v_cell ->> 'event_type');
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    RETURN QUERY
    SELECT format('Every event %s%s on %s counts once, also of unknown users.',
            v_cell ->> 'event_type', analytics._cell_scope(v_cell), v_day),
        e.event_id::text, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    WHERE e.event_type_key = v_type AND e.occurred_at >= r_days.since
        AND e.occurred_at < r_days.until AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_daily_events(jsonb) IS
    'See analytics.trace: events behind a cell of daily_events.';

CREATE FUNCTION analytics._cells_daily_events(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'day', analytics._day_of(p_at),
            'event_type', e.event_type, 'measure', 'events'),
        'An event of its day and type.'
    FROM analytics.events AS e
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_daily_events(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of daily_events that count an event.';

CREATE FUNCTION analytics._trace_active_users(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{day}', '{dau, wau, mau}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_account bigint := analytics._cell_account(v_cell);
    v_length integer := CASE v_cell ->> 'measure' WHEN 'dau' THEN 1 WHEN 'wau' THEN 7 ELSE 30 END;
    r_days record := analytics._days_between(v_day - v_length + 1, v_day);
BEGIN
    RETURN QUERY
    SELECT format('A user counts once if he has any event%s from %s to %s, both days included; '
            'unknown users never do.',
            analytics._cell_scope(v_cell), v_day - v_length + 1, v_day),
        NULL, NULL::numeric, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    WHERE e.user_key <> 0 AND e.occurred_at >= r_days.since AND e.occurred_at < r_days.until
        AND (v_account = 0 OR e.account_key = v_account);
END
$$;
COMMENT ON FUNCTION analytics._trace_active_users(jsonb) IS
    'See analytics.trace: events behind a cell of active_users.';

CREATE FUNCTION analytics._cells_active_users(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_day date := analytics._day_of(p_at);
    v_last date := (
        SELECT max(shown.day) FROM analytics.daily_events AS shown WHERE shown.account_id = '*'
    );
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'day', v_day + later.days,
            'measure', span.measure),
        format('Makes its user active on %s, which is one of the %s days that end with this day.',
            v_day, span.length)
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN (VALUES ('dau', 1), ('wau', 7), ('mau', 30)) AS span (measure, length)
    CROSS JOIN LATERAL generate_series(0, span.length - 1) AS later (days)
    WHERE p_user <> 0 AND v_day + later.days <= v_last;
END
$$;
COMMENT ON FUNCTION analytics._cells_active_users(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of active_users that count an event.';

CREATE FUNCTION analytics._money_measures(
    p_revenue numeric, p_event_type_key integer, p_user bigint
)
RETURNS TABLE (measure text, amount numeric, is_of_user boolean)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 3
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_is_refund boolean := p_revenue < 0 OR p_event_type_key = ANY (analytics._refund_keys());
BEGIN
    RETURN QUERY
    SELECT m.measure, m.amount, m.is_of_user
    FROM (
        VALUES
            ('orders', NULL::numeric, false, NOT v_is_refund),
            ('gross', p_revenue, false, NOT v_is_refund),
            ('refunds', abs(p_revenue), false, v_is_refund),
            ('net', CASE WHEN v_is_refund THEN -abs(p_revenue) ELSE p_revenue END, false, true),
            ('paying_users', NULL, true, NOT v_is_refund AND p_revenue > 0 AND p_user <> 0)
    ) AS m (measure, amount, is_of_user, counts)
    WHERE m.counts;
END
$$;
COMMENT ON FUNCTION analytics._money_measures(numeric, integer, bigint) IS
    'The measures of revenue_summary that an event with money counts in, and what it adds to a '
    'sum.';

CREATE FUNCTION analytics._trace_revenue_summary(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{day, currency}',
        '{net, orders, gross, refunds, paying_users, active_users}');
    v_day date := analytics._cell_day(v_cell, 'day');
    v_account bigint := analytics._cell_account(v_cell);
    v_measure text := v_cell ->> 'measure';
    r_days record := analytics._days_between(v_day, v_day);
BEGIN
    IF v_measure = 'active_users' THEN
        RETURN QUERY
        SELECT * FROM analytics._trace_active_users(
            v_cell - 'currency' || '{"measure": "dau"}'
        );
        RETURN;
    END IF;
    RETURN QUERY
    SELECT format('Events in %s%s on %s: %s.', v_cell ->> 'currency',
            analytics._cell_scope(v_cell), v_day, CASE v_measure
                WHEN 'orders' THEN 'each with money that is no refund counts once'
                WHEN 'gross' THEN 'the amounts of those that are no refunds'
                WHEN 'refunds' THEN 'the amounts, without sign, of refunds: events of a type in '
                    'config.refund_events, and negative amounts'
                WHEN 'net' THEN 'the amounts, refunds taken off'
                ELSE 'a user counts once if he has one above 0 that is no refund; unknown users '
                    'never do'
            END),
        CASE WHEN NOT measures.is_of_user THEN e.event_id::text END,
        measures.amount, e.user_key, e.event_id, e.occurred_at
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._money_measures(e.revenue, e.event_type_key, e.user_key)
        AS measures
    WHERE e.revenue IS NOT NULL AND e.currency = v_cell ->> 'currency'
        AND e.occurred_at >= r_days.since AND e.occurred_at < r_days.until
        AND (v_account = 0 OR e.account_key = v_account)
        AND measures.measure = v_measure;
END
$$;
COMMENT ON FUNCTION analytics._trace_revenue_summary(jsonb) IS
    'See analytics.trace: events behind a cell of revenue_summary.';

CREATE FUNCTION analytics._cells_revenue_summary(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_day date := analytics._day_of(p_at);
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'day', v_day,
            'currency', e.currency, 'measure', measures.measure),
        CASE
            WHEN measures.is_of_user THEN 'Makes its user a paying one of the day.'
            WHEN measures.amount IS NULL THEN 'An order of the day.'
            ELSE format('Adds %s.', measures.amount)
        END
    FROM analytics.events AS e
    CROSS JOIN analytics._event_accounts(p_user, p_at, p_event) AS scope
    CROSS JOIN LATERAL analytics._money_measures(e.revenue, e.event_type_key, e.user_key)
        AS measures
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
        AND e.revenue IS NOT NULL;

    -- The users of the day stand beside the money of each currency.
    RETURN QUERY
    SELECT jsonb_build_object('account_id', shown.account_id, 'day', v_day,
            'currency', shown.currency, 'measure', 'active_users'),
        'Makes its user active on the day.'
    FROM analytics._event_accounts(p_user, p_at, p_event) AS scope
    JOIN analytics.revenue_summary AS shown
        ON shown.account_id = scope.account_id AND shown.day = v_day
    WHERE p_user <> 0;
END
$$;
COMMENT ON FUNCTION analytics._cells_revenue_summary(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of revenue_summary that count an event.';
