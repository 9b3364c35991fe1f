-- Room 60, revenue: money by account, day and currency. Facts carry the amount as numeric and its
-- currency (room 20 reads them); here they become orders and refunds. Sums never mix currencies.
-- Reads analytics.events; read by analytics.revenue and by verify().

CREATE FUNCTION analytics._revenue_entries(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_currency text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    day date,
    currency text,
    orders bigint,
    gross numeric,
    refunds numeric,
    has_paid boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('day', p_from, p_to);
    v_days date[] := spectrum.period_dates(v_starts);
    v_refund_events text[] := (SELECT s.refund_events FROM analytics.settings AS s);
BEGIN
    RETURN QUERY
    WITH money_events AS (
        SELECT
            CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END AS scope,
            e.user_key,
            width_bucket(e.occurred_at, v_starts) AS number,
            e.currency,
            e.revenue,
            e.revenue < 0 OR e.event_type = ANY (v_refund_events) AS is_refund
        FROM analytics.events AS e
        WHERE e.revenue IS NOT NULL
            AND e.occurred_at >= p_from
            AND e.occurred_at < p_to
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (p_currency IS NULL OR e.currency = p_currency)
            AND (NOT p_by_account OR e.account_key <> 0)
    )
    SELECT
        m.scope,
        m.user_key,
        v_days[m.number],
        m.currency,
        count(*) FILTER (WHERE NOT m.is_refund),
        coalesce(sum(m.revenue) FILTER (WHERE NOT m.is_refund), 0),
        coalesce(sum(abs(m.revenue)) FILTER (WHERE m.is_refund), 0),
        m.user_key <> 0 AND bool_or(NOT m.is_refund AND m.revenue > 0)
    FROM money_events AS m
    GROUP BY m.scope, m.user_key, m.number, m.currency;
END
$$;
COMMENT ON FUNCTION analytics._revenue_entries(
    timestamptz, timestamptz, text, text, boolean
) IS
    'What each user contributes: his money by day and currency. The unknown user''s (key 0) is '
    'money too, but he never is a paying user.';

CREATE FUNCTION analytics._revenue(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_currency text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    day date,
    currency text,
    orders bigint,
    gross numeric,
    refunds numeric,
    net numeric,
    paying_users bigint,
    active_users bigint,
    arpu numeric,
    arppu numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_from timestamptz;
    v_to timestamptz;
    v_starts timestamptz[];
    v_days date[];
BEGIN
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    IF v_from IS NULL OR v_to IS NULL OR v_from >= v_to THEN
        RETURN;
    END IF;
    v_starts := spectrum.period_starts('day', v_from, v_to);
    v_days := spectrum.period_dates(v_starts);

    RETURN QUERY
    WITH sums AS (
        SELECT
            r.account_id,
            r.day,
            r.currency,
            sum(r.orders)::bigint AS orders,
            sum(r.gross) AS gross,
            sum(r.refunds) AS refunds,
            -- A quotient has digits by the zeros that its parts end with.
            trim_scale(sum(r.gross) - sum(r.refunds)) AS net,
            count(*) FILTER (WHERE r.has_paid) AS paying_users
        FROM analytics._revenue_entries(v_from, v_to, p_account, p_currency, p_by_account) AS r
        GROUP BY r.account_id, r.day, r.currency
    ),
    active AS (
        SELECT
            CASE WHEN p_by_account THEN t.breakdown ELSE coalesce(p_account, '*') END AS account_id,
            v_days[t.period_number] AS day,
            nullif(t.value, 0) AS users
        FROM analytics._trend(
            NULL, v_starts, v_from, v_to, 'users', NULL,
            CASE WHEN p_by_account THEN 'account_id' END, p_account, NULL
        ) AS t
    )
    SELECT
        s.account_id,
        s.day,
        s.currency,
        s.orders,
        s.gross,
        s.refunds,
        s.net,
        s.paying_users,
        coalesce(a.users, 0)::bigint,
        trim_scale(s.net / a.users),
        trim_scale(s.net / nullif(s.paying_users, 0))
    FROM sums AS s
    LEFT JOIN active AS a ON a.account_id = s.account_id AND a.day = s.day;
END
$$;
COMMENT ON FUNCTION analytics._revenue(timestamptz, timestamptz, text, text, boolean) IS
    'Revenue of each scope, day and currency: settles the range, sums the users up, divides.';

CREATE FUNCTION analytics._standing_revenue_summary()
RETURNS TABLE (
    account_id text,
    day date,
    currency text,
    orders bigint,
    gross numeric,
    refunds numeric,
    net numeric,
    paying_users bigint,
    active_users bigint,
    arpu numeric,
    arppu numeric
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY SELECT * FROM analytics._revenue(NULL, NULL, NULL, NULL, false);
    RETURN QUERY SELECT * FROM analytics._revenue(NULL, NULL, NULL, NULL, true);
END
$$;
COMMENT ON FUNCTION analytics._standing_revenue_summary() IS
    'What analytics.revenue_summary has to show, out of all events: for verify().';

CREATE FUNCTION analytics.revenue(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL,
    p_currency text DEFAULT NULL
)
RETURNS TABLE (
    day date,
    currency text,
    orders bigint,
    gross numeric,
    refunds numeric,
    net numeric,
    paying_users bigint,
    active_users bigint,
    arpu numeric,
    arppu numeric
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    IF p_currency !~ '^[A-Za-z]{3}$' THEN
        PERFORM spectrum._reject('p_currency', p_currency, 'three letters, or NULL for each');
    END IF;

    RETURN QUERY
    SELECT
        r.day, r.currency, r.orders, r.gross, r.refunds, r.net, r.paying_users, r.active_users,
        r.arpu, r.arppu
    FROM analytics._revenue(p_from, p_to, p_account, upper(p_currency), false) AS r
    ORDER BY r.day, r.currency;
END
$$;
COMMENT ON FUNCTION analytics.revenue(timestamptz, timestamptz, text, text) IS
    'Orders, gross, refunds (positive), net, paying and active users, net per active user (arpu) '
    'and per paying user (arppu), by day and currency, over the events of [p_from, p_to); days and '
    'currencies without money are no rows. NULL: all time, all accounts, each currency.';
