-- Room 60, lifecycle: of the users of each period, who is new, who returns, who comes back after a
-- pause, and who stays away. Reads analytics.events. Also here: in which periods a user was active,
-- which stickiness and feature adoption count too.
--
-- An active period of a user tells on itself and on the next one, and how depends only on when he
-- was active before: analytics._lifecycle_rule. So users are counted by (period, time since their
-- last active one), and the rule is applied to these few cells.

CREATE FUNCTION analytics._active_periods(
    p_event text,
    p_starts timestamptz[],
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (account_id text, user_key bigint, numbers integer[], first_at timestamptz)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_event_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t WHERE t.event_type = p_event
    );
    v_is_by_day boolean := num_nonnulls(p_event, p_account) = 0 AND NOT p_by_account
        AND analytics._keeps_days(NULL, NULL);
BEGIN
    IF p_event IS NOT NULL AND v_event_key IS NULL THEN
        RETURN;
    END IF;

    -- Sorting events by user, and each user's few numbers by themselves, beats sorting by both.
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN min(e.account_id) ELSE coalesce(p_account, '*') END,
        e.user_key,
        array_agg(DISTINCT e.number ORDER BY e.number),
        min(e.occurred_at)
    FROM (
        SELECT
            CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS scope_key,
            e.account_id,
            e.user_key,
            e.occurred_at,
            width_bucket(e.occurred_at, p_starts) AS number
        FROM analytics.events AS e
        WHERE e.user_key <> 0
            AND e.occurred_at >= p_starts[1]
            AND e.occurred_at < p_starts[cardinality(p_starts)]
            AND (v_event_key IS NULL OR e.event_type_key = v_event_key)
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
            AND NOT v_is_by_day
        UNION ALL
        SELECT 0, '*', d.user_key, d.occurred_at, width_bucket(d.occurred_at, p_starts)
        FROM analytics.user_days AS d
        WHERE v_is_by_day
            AND d.occurred_at >= p_starts[1]
            AND d.occurred_at < p_starts[cardinality(p_starts)]
    ) AS e
    GROUP BY e.user_key, e.scope_key;
END
$$;
COMMENT ON FUNCTION analytics._active_periods(text, timestamptz[], text, boolean) IS
    'Each user''s periods (numbered by p_starts, ascending) with p_event (NULL: any event), and '
    'the first time of it. For one account, for all together (*), or, with p_by_account, for each '
    'account by itself.';

CREATE FUNCTION analytics._lifecycle_rule()
RETURNS TABLE (
    since integer,
    shift integer,
    new integer,
    "returning" integer,
    resurrecting integer,
    dormant integer
)
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    VALUES
        (0, 0, 1, 0, 0, 0),
        (0, 1, 0, 0, 0, -1),
        -- Dormant was noted by the period before, until this one says otherwise.
        (1, 0, 0, 1, 0, 1),
        (1, 1, 0, 0, 0, -1),
        (2, 0, 0, 0, 1, 0),
        (2, 1, 0, 0, 0, -1)
$$;
COMMENT ON FUNCTION analytics._lifecycle_rule() IS
    'What an active period of a user adds to itself (shift 0) and to the next period (shift 1), by '
    'the periods since his last active one: 0 there was none, 1 the period before, 2 longer ago.';

CREATE FUNCTION analytics._lifecycle(
    p_period text,
    p_from timestamptz,
    p_to timestamptz,
    p_event text,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    period date,
    new bigint,
    "returning" bigint,
    resurrecting bigint,
    dormant bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    v_starts timestamptz[];
    v_first_number integer;
    v_dates date[];
BEGIN
    SELECT h.starts, h.first_number INTO v_starts, v_first_number
    FROM analytics._history_periods(p_period, p_from, p_to) AS h;
    v_dates := spectrum.period_dates(v_starts);

    RETURN QUERY
    WITH cells AS MATERIALIZED (
        SELECT
            u.account_id,
            a.number,
            least(2, coalesce(a.number - a.previous, 0)) AS since,
            count(*) AS users
        FROM analytics._active_periods(p_event, v_starts, p_account, p_by_account) AS u
        CROSS JOIN LATERAL unnest(u.numbers, array_prepend(NULL, u.numbers))
            AS a (number, previous)
        WHERE a.number IS NOT NULL
        GROUP BY u.account_id, a.number, since
    ),
    scopes AS (
        SELECT c.account_id, coalesce(v_first_number, min(c.number)) AS first_number
        FROM cells AS c
        GROUP BY c.account_id
        UNION
        -- A single scope has the periods that were asked for even where nobody came.
        SELECT coalesce(p_account, '*'), v_first_number
        WHERE NOT p_by_account
    ),
    amounts AS (
        SELECT
            c.account_id,
            c.number + r.shift AS number,
            c.users * r.new AS new,
            c.users * r."returning" AS "returning",
            c.users * r.resurrecting AS resurrecting,
            c.users * r.dormant AS dormant
        FROM cells AS c
        JOIN analytics._lifecycle_rule() AS r USING (since)
        UNION ALL
        SELECT s.account_id, n.number, 0, 0, 0, 0
        FROM scopes AS s
        CROSS JOIN generate_series(s.first_number, cardinality(v_starts) - 1) AS n (number)
    )
    SELECT
        a.account_id,
        v_dates[a.number],
        sum(a.new)::bigint,
        sum(a."returning")::bigint,
        sum(a.resurrecting)::bigint,
        sum(a.dormant)::bigint
    FROM amounts AS a
    WHERE a.number >= coalesce(v_first_number, 1) AND a.number < cardinality(v_starts)
    GROUP BY a.account_id, a.number;
END
$$;
COMMENT ON FUNCTION analytics._lifecycle(
    text, timestamptz, timestamptz, text, text, boolean
) IS
    'The lifecycle of each scope: every user''s whole history up to the end of the range, in the '
    'periods of the range; of an open one from the first active period of each scope.';

CREATE FUNCTION analytics.lifecycle(
    p_period text DEFAULT 'day',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_event text DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (
    period date,
    new bigint,
    "returning" bigint,
    resurrecting bigint,
    dormant bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT l.period, l.new, l."returning", l.resurrecting, l.dormant
    FROM analytics._lifecycle(p_period, p_from, p_to, p_event, p_account, false) AS l
    ORDER BY l.period;
END
$$;
COMMENT ON FUNCTION analytics.lifecycle(text, timestamptz, timestamptz, text, text) IS
    'Users by what their activity (p_event; NULL: any event) is to them, one row a day, week or '
    'month that [p_from, p_to) touches, each whole: new (active for the first time ever, looking '
    'before p_from too), returning (active in the period before), resurrecting (active again after '
    'a pause), dormant (active in the period before and not in this one: a negative number). NULL '
    'p_from: from the first active period; NULL p_to: to the last period with an event.';
