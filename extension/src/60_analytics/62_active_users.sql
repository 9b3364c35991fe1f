-- Room 60, active users: exact distinct users of each day, of the 7 and of the 30 days that end
-- with it. Reads analytics.events; read by analytics.active_users and by verify().
--
-- Gaps and islands instead of a self join: an active day of a user makes him a weekly user on that
-- day and the six after it, but only up to his next active day, which takes over. So each user-day
-- carries the gap to the next one, users are counted by (day, gap), and each count is a running
-- sum over these few cells: + at the day, - where its share ends.


CREATE FUNCTION analytics._active_days(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (account_id text, user_key bigint, day date, gap integer)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('day', p_from, p_to);
    v_days date[] := analytics._period_dates(v_starts);
    v_is_by_day boolean := p_account IS NULL AND NOT p_by_account AND analytics._has_user_days();
BEGIN
    RETURN QUERY
    WITH event_days AS (
        SELECT
            CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END AS scope,
            CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS scope_key,
            e.user_key,
            width_bucket(e.occurred_at, v_starts) AS number
        FROM analytics.events AS e
        WHERE e.user_key <> 0
            AND e.occurred_at >= p_from
            AND e.occurred_at < p_to
            AND (p_account IS NULL OR e.account_id = p_account)
            AND (NOT p_by_account OR e.account_key <> 0)
            AND NOT v_is_by_day
        UNION ALL
        SELECT '*', 0, d.user_key, width_bucket(d.occurred_at, v_starts)
        FROM analytics.user_days AS d
        WHERE v_is_by_day AND d.occurred_at >= p_from AND d.occurred_at < p_to
    ),
    successions AS (
        SELECT
            d.scope,
            d.user_key,
            d.number,
            lead(d.number) OVER (PARTITION BY d.scope_key, d.user_key ORDER BY d.number)
                AS next_number
        FROM event_days AS d
    )
    -- The last event of each day stands for the day: its successor lies on another one.
    SELECT
        s.scope,
        s.user_key,
        v_days[s.number],
        least(30, v_days[s.next_number] - v_days[s.number])
    FROM successions AS s
    WHERE s.next_number IS DISTINCT FROM s.number;
END
$$;
COMMENT ON FUNCTION analytics._active_days(timestamptz, timestamptz, text, boolean) IS
    'What each user contributes: his active days among the events of [p_from, p_to), each with the '
    'days until his next one, at most 30. For one account, for all together (*), or, with '
    'p_by_account, for each account by itself.';

CREATE FUNCTION analytics._count_active_users(
    p_first_day date,
    p_last_day date,
    p_read_from timestamptz,
    p_read_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (account_id text, day date, dau bigint, wau bigint, mau bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    WITH cells AS MATERIALIZED (
        SELECT a.account_id, a.day, a.gap, count(*) AS users
        FROM analytics._active_days(p_read_from, p_read_to, p_account, p_by_account) AS a
        GROUP BY a.account_id, a.day, a.gap
    ),
    scopes AS (
        SELECT c.account_id, min(c.day) AS read_day FROM cells AS c GROUP BY c.account_id
        UNION ALL
        -- A single scope has the days that were asked for even where nobody came.
        SELECT coalesce(p_account, '*'), p_first_day
        WHERE NOT p_by_account AND NOT EXISTS (SELECT FROM cells)
    ),
    scope_days AS (
        SELECT s.account_id, s.read_day + n.number AS day
        FROM scopes AS s
        CROSS JOIN LATERAL generate_series(0, p_last_day - s.read_day) AS n (number)
        UNION
        SELECT s.account_id, p_first_day + n.number
        FROM scopes AS s
        CROSS JOIN LATERAL generate_series(0, p_last_day - p_first_day) AS n (number)
    ),
    changes AS (
        SELECT
            c.account_id,
            d.day,
            sum(d.dau)::bigint AS dau,
            sum(d.wau)::bigint AS wau,
            sum(d.mau)::bigint AS mau
        FROM cells AS c
        CROSS JOIN LATERAL (
            VALUES
                (c.day, c.users, c.users, c.users),
                (c.day + least(c.gap, 7), 0, -c.users, 0),
                (c.day + c.gap, 0, 0, -c.users)
        ) AS d (day, dau, wau, mau)
        GROUP BY c.account_id, d.day
    ),
    counts AS (
        SELECT
            d.account_id,
            d.day,
            coalesce(c.dau, 0) AS dau,
            coalesce(sum(c.wau) OVER until_day, 0)::bigint AS wau,
            coalesce(sum(c.mau) OVER until_day, 0)::bigint AS mau
        FROM scope_days AS d
        LEFT JOIN changes AS c ON c.account_id = d.account_id AND c.day = d.day
        WINDOW until_day AS (PARTITION BY d.account_id ORDER BY d.day)
    )
    SELECT c.account_id, c.day, c.dau, c.wau, c.mau
    FROM counts AS c
    WHERE c.day >= p_first_day OR p_first_day IS NULL;
END
$$;
COMMENT ON FUNCTION analytics._count_active_users(
    date, date, timestamptz, timestamptz, text, boolean
) IS
    'The counts of each day from p_first_day (NULL: the first active day of each scope) to '
    'p_last_day, out of the events of [p_read_from, p_read_to).';

CREATE FUNCTION analytics._active_users(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    day date,
    dau bigint,
    wau bigint,
    mau bigint,
    stickiness double precision
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_first_day date := spectrum.period_date(spectrum.period_start('day', p_from));
    v_from timestamptz;
    v_to timestamptz;
    v_read_from timestamptz;
    v_last_day timestamptz[];
BEGIN
    SELECT r.from_at, r.to_at INTO v_from, v_to
    FROM analytics._settle_range(p_from, p_to, p_account) AS r;
    -- 30 days end with the first day asked for; 31, since days differ in length.
    v_read_from := spectrum.period_start('day', v_from)
        - CASE WHEN p_from IS NULL THEN interval '0' ELSE interval '31 days' END;
    IF v_to IS NULL OR v_read_from IS NULL OR v_to <= coalesce(p_from, v_read_from) THEN
        RETURN;
    END IF;
    v_last_day := spectrum.period_starts('day', v_to - interval '1 us', v_to);

    RETURN QUERY
    SELECT c.account_id, c.day, c.dau, c.wau, c.mau, c.dau / nullif(c.mau, 0)::double precision
    FROM analytics._count_active_users(
        v_first_day, spectrum.period_date(v_last_day[1]), v_read_from, v_last_day[2],
        p_account, p_by_account
    ) AS c;
END
$$;
COMMENT ON FUNCTION analytics._active_users(timestamptz, timestamptz, text, boolean) IS
    'Active users of each scope and day: settles the range, counts, divides.';

CREATE FUNCTION analytics._standing_active_users()
RETURNS TABLE (
    account_id text,
    day date,
    dau bigint,
    wau bigint,
    mau bigint,
    stickiness double precision
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY SELECT * FROM analytics._active_users(NULL, NULL, NULL, false);
    RETURN QUERY SELECT * FROM analytics._active_users(NULL, NULL, NULL, true);
END
$$;
COMMENT ON FUNCTION analytics._standing_active_users() IS
    'What analytics.active_users has to show, out of all events: for verify().';

CREATE FUNCTION analytics.active_users(
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (day date, dau bigint, wau bigint, mau bigint, stickiness double precision)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    RETURN QUERY
    SELECT a.day, a.dau, a.wau, a.mau, a.stickiness
    FROM analytics._active_users(p_from, p_to, p_account, false) AS a
    ORDER BY a.day;
END
$$;
COMMENT ON FUNCTION analytics.active_users(timestamptz, timestamptz, text) IS
    'Exact daily, weekly (7 days) and monthly (30 days) active users: one row a calendar day that '
    '[p_from, p_to) touches, zero days included; each day counts whole and the windows look back '
    'before p_from. NULL p_from: from the first active day; NULL p_to: to the last day with an '
    'event. p_account NULL: all accounts.';
