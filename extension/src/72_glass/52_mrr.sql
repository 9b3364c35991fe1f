-- Room 72, glass of recurring revenue: which events moved the MRR of an account, and how. Before it
-- the periods of cells, which other views have too.

CREATE FUNCTION analytics._cell_period(
    p_cell jsonb, p_key text, p_kind text, OUT since timestamptz, OUT until timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_day date := analytics._cell_day(p_cell, p_key);
    v_starts timestamptz[];
BEGIN
    since := (analytics._days_between(v_day, v_day)).since;
    v_starts := spectrum.period_starts(p_kind, since, since + interval '1 us');
    IF spectrum.period_date(v_starts[1]) <> v_day THEN
        PERFORM spectrum._reject('p_cell.' || p_key, p_cell ->> p_key,
            format('the first day of a %s', p_kind));
    END IF;
    until := v_starts[2];
END
$$;
COMMENT ON FUNCTION analytics._cell_period(jsonb, text, text) IS
    'When the day, week or month begins and ends that a key of a cell names; raises 22023 unless '
    'it is the first day of one.';

CREATE FUNCTION analytics._cell_period_kind(p_cell jsonb, p_kinds text[])
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_cell.period_kind', p_cell ->> 'period_kind', p_kinds);
    RETURN p_cell ->> 'period_kind';
END
$$;
COMMENT ON FUNCTION analytics._cell_period_kind(jsonb, text[]) IS
    'The kind of period that a cell names; raises 22023 unless it is one of these.';

CREATE FUNCTION analytics._mrr_evidence(p_account bigint)
RETURNS TABLE (
    account_key bigint, currency text, moved_at timestamptz, movement text, change numeric,
    user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_currency text := (SELECT s.currency FROM analytics.settings AS s);
    v_keys integer[] := analytics._subscription_keys();
BEGIN
    RETURN QUERY
    WITH told AS MATERIALIZED (
        SELECT e.account_key, e.user_key, e.event_id, e.occurred_at, r.place, r.subscription,
            r.mrr, r.currency
        FROM analytics.events AS e
        CROSS JOIN LATERAL analytics._read_subscription(
            e.event_type, e.properties, v_currency
        ) AS r
        WHERE e.event_type_key = ANY (v_keys) AND e.account_key <> 0 AND r.problem IS NULL
            AND (p_account = 0 OR e.account_key = p_account)
    ),
    movements AS (
        SELECT m.*
        FROM (
            SELECT array_agg(t.account_key) AS account_keys, array_agg(t.occurred_at) AS times,
                array_agg(t.place) AS places, array_agg(t.event_id) AS event_ids,
                array_agg(t.subscription) AS subscriptions, array_agg(t.mrr) AS mrr,
                array_agg(t.currency) AS currencies
            FROM told AS t
        ) AS h
        CROSS JOIN LATERAL analytics._mrr_movements(
            h.account_keys, h.times, h.places, h.event_ids, h.subscriptions, h.mrr, h.currencies
        ) AS m
    ),
    changes AS (
        SELECT s.account_key, c.currency, s.user_key, s.event_id, s.occurred_at,
            sum(c.change) AS change
        FROM (
            SELECT t.*, lag(t.mrr) OVER subscriptions AS mrr_before,
                lag(t.currency) OVER subscriptions AS currency_before
            FROM told AS t
            WINDOW subscriptions AS (
                PARTITION BY t.account_key, t.subscription
                ORDER BY t.occurred_at, t.place, t.event_id
            )
        ) AS s
        CROSS JOIN LATERAL (
            VALUES (s.currency, s.mrr), (s.currency_before, -s.mrr_before)
        ) AS c (currency, change)
        WHERE c.change <> 0
        GROUP BY s.account_key, c.currency, s.user_key, s.event_id, s.occurred_at
        HAVING sum(c.change) <> 0
    )
    SELECT m.account_key, m.currency, m.moved_at, m.movement, c.change, c.user_key, c.event_id,
        c.occurred_at
    FROM movements AS m
    JOIN changes AS c ON c.account_key = m.account_key AND c.currency = m.currency
        AND c.occurred_at >= m.moved_at
        AND c.occurred_at < m.moved_at + interval '60 minutes';
END
$$;
COMMENT ON FUNCTION analytics._mrr_evidence(bigint) IS
    'The events of an account (0: of all) that moved its MRR, by how much each, and the movement '
    'that they are part of. The rule is that of analytics._mrr_movements.';

CREATE FUNCTION analytics._mrr_measures(
    p_movement text, p_change numeric, p_account_id text, p_moved_at timestamptz
)
RETURNS TABLE (measure text, unit text, amount numeric, rule text)
LANGUAGE plpgsql STABLE PARALLEL SAFE ROWS 2
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_what text := CASE p_movement
        WHEN 'new' THEN 'the first MRR that an account ever has'
        WHEN 'expansion' THEN 'by what the MRR of an account grows'
        WHEN 'contraction' THEN 'by what the MRR of an account shrinks, but not to nothing'
        WHEN 'churn' THEN 'the MRR that an account has no more, when it comes to nothing'
        ELSE 'the MRR of an account that had none any more'
    END;
BEGIN
    RETURN QUERY
    SELECT p_movement, p_account_id,
        CASE WHEN p_movement IN ('contraction', 'churn') THEN -p_change ELSE p_change END,
        format('%s; the amounts of its events add up', v_what)
    UNION ALL
    SELECT m.measure, format('%s %s', p_account_id, p_moved_at), NULL,
        format('each time counts: %s', v_what)
    FROM (
        VALUES ('new', 'new_accounts'), ('churn', 'churned_accounts'),
            ('reactivation', 'reactivated_accounts')
    ) AS m (movement, measure)
    WHERE m.movement = p_movement;
END
$$;
COMMENT ON FUNCTION analytics._mrr_measures(text, numeric, text, timestamptz) IS
    'The measures of mrr_movements that an event of a movement counts in, what it makes count, '
    'what it adds, and how.';

CREATE FUNCTION analytics._mrr_rule(
    p_rule text, p_kind text, p_period date, p_currency text
)
RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN format('Movements in %s that begin in the %s of %s: %s. What changes within 60 minutes '
        'of the first change is one movement.', p_currency, p_kind, p_period, p_rule);
END
$$;
COMMENT ON FUNCTION analytics._mrr_rule(text, text, date, text) IS
    'By what mrr_movements counts, in words.';

CREATE FUNCTION analytics._trace_mrr_movements(p_cell jsonb)
RETURNS TABLE (
    rule text, unit text, amount numeric, user_key bigint, event_id uuid, occurred_at timestamptz
)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_cell jsonb := analytics._read_cell(p_cell, '{period_kind, period, currency}',
        '{new, expansion, contraction, churn, reactivation, new_accounts, churned_accounts, '
        'reactivated_accounts}');
    v_kind text := analytics._cell_period_kind(v_cell, '{week, month}');
    r_period record := analytics._cell_period(v_cell, 'period', v_kind);
BEGIN
    RETURN QUERY
    SELECT analytics._mrr_rule(
            measures.rule, v_kind, (v_cell ->> 'period')::date, found.currency
        ),
        measures.unit, measures.amount, found.user_key, found.event_id, found.occurred_at
    FROM analytics._mrr_evidence(analytics._cell_account(v_cell)) AS found
    JOIN analytics.accounts AS known ON known.account_key = found.account_key
    CROSS JOIN LATERAL analytics._mrr_measures(
        found.movement, found.change, known.account_id, found.moved_at
    ) AS measures
    WHERE found.currency = v_cell ->> 'currency' AND found.moved_at >= r_period.since
        AND found.moved_at < r_period.until AND measures.measure = v_cell ->> 'measure';
END
$$;
COMMENT ON FUNCTION analytics._trace_mrr_movements(jsonb) IS
    'See analytics.trace: events behind a cell of mrr_movements.';

CREATE FUNCTION analytics._cells_mrr_movements(p_user bigint, p_at timestamptz, p_event uuid)
RETURNS TABLE (cell jsonb, rule text)
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT jsonb_build_object('account_id', scope.account_id, 'period_kind', kind.name,
            'period', p.period, 'currency', found.currency, 'measure', measures.measure),
        analytics._mrr_rule(measures.rule, kind.name, p.period, found.currency)
        || CASE WHEN measures.amount IS NOT NULL THEN format(' This adds %s.', measures.amount)
            ELSE '' END
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._mrr_evidence(e.account_key) AS found
    CROSS JOIN LATERAL analytics._mrr_measures(
        found.movement, found.change, e.account_id, found.moved_at
    ) AS measures
    CROSS JOIN (VALUES ('week'), ('month')) AS kind (name)
    CROSS JOIN LATERAL (
        SELECT spectrum.period_date(spectrum.period_start(kind.name, found.moved_at)) AS period
        OFFSET 0
    ) AS p
    CROSS JOIN LATERAL (VALUES ('*'), (e.account_id)) AS scope (account_id)
    WHERE e.user_key = p_user AND e.occurred_at = p_at AND e.event_id = p_event
        AND e.account_key <> 0 AND e.event_type LIKE 'subscription\_%'
        AND found.event_id = p_event;
END
$$;
COMMENT ON FUNCTION analytics._cells_mrr_movements(bigint, timestamptz, uuid) IS
    'See spectrum.explain_event: the cells of mrr_movements that count an event.';
