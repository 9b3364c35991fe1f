-- Room 60, active users: exact distinct users of each day, of the 7 and of the 30 days that end
-- with it. Reads analytics.events; read by analytics.active_users and by verify().
--
-- Gaps and islands instead of a self join: an active day of a user makes him a weekly user on that
-- day and the six after it, but only up to his next active day, which takes over. So each user-day
-- carries the gap to the next one, users are counted by (day, gap), and each count is a running
-- sum over these few cells: + at the day, - where its share ends.


CREATE FUNCTION analytics._user_spans(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean,
    p_by_day boolean,
    p_first_user bigint,
    p_last_user bigint
)
RETURNS TABLE (account_id text, day date, gap integer, users bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE COST 100000000 ROWS 10000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    v_starts timestamptz[] := spectrum.period_starts('day', p_from, p_to);
    v_days date[] := spectrum.period_dates(v_starts);
    v_account_key bigint := (
        SELECT a.account_key FROM analytics.accounts AS a WHERE a.account_id = p_account
    );
BEGIN
    RETURN QUERY
    WITH active_days AS (
        SELECT CASE WHEN p_by_account THEN e.account_key END AS scope_key, e.user_key,
            width_bucket(e.occurred_at, v_starts) AS number
        FROM analytics.event_keys AS e
        WHERE e.user_key BETWEEN p_first_user AND p_last_user
            AND e.occurred_at >= p_from
            AND e.occurred_at < p_to
            AND (p_account IS NULL OR e.account_key = v_account_key)
            AND (NOT p_by_account OR e.account_key <> 0)
            AND NOT p_by_day
        UNION ALL
        SELECT NULL, d.user_key, width_bucket(d.day, v_days)
        FROM analytics.user_days AS d
        WHERE p_by_day AND d.user_key BETWEEN p_first_user AND p_last_user
            AND d.day >= v_days[1] AND d.day < v_days[cardinality(v_days)]
    ),
    successions AS (
        SELECT d.scope_key, d.number,
            lead(d.number) OVER (PARTITION BY d.user_key, d.scope_key ORDER BY d.number)
                AS next_number
        FROM active_days AS d
    ),
    -- The last event of each day stands for the day: its successor lies on another one. No two
    -- days have the same date, so the 30th from a day on is 30 days later, or more.
    spans AS (
        SELECT s.scope_key, s.number, least(s.next_number, s.number + 30) AS next_number,
            count(*) AS users
        FROM successions AS s
        WHERE s.next_number IS DISTINCT FROM s.number
        GROUP BY 1, 2, 3
    )
    SELECT
        CASE WHEN p_by_account THEN (
            SELECT a.account_id FROM analytics.accounts AS a WHERE a.account_key = s.scope_key
        ) ELSE coalesce(p_account, '*') END,
        v_days[s.number],
        least(30, v_days[s.next_number] - v_days[s.number]),
        s.users
    FROM spans AS s;
END
$$;
COMMENT ON FUNCTION analytics._user_spans(
    timestamptz, timestamptz, text, boolean, boolean, bigint, bigint
) IS
    'How many users were active on a day, among the events of [p_from, p_to), and so many days '
    'later, at most 30, on their next one. For one account, for all together (*), or, with '
    'p_by_account, for each account by itself; p_by_day: out of the days that are kept. Users from '
    'p_first_user to p_last_user.';

CREATE FUNCTION analytics._active_spans(
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_by_account boolean
)
RETURNS TABLE (account_id text, day date, gap integer, users bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_is_all boolean := p_account IS NULL AND NOT p_by_account;
    v_is_by_day boolean := v_is_all AND analytics._keeps_days(p_from, p_to);
    v_cuts bigint[] := CASE WHEN v_is_all
        THEN analytics._user_cuts(CASE WHEN NOT v_is_by_day THEN p_from END)
        ELSE '{1, 9223372036854775807}'::bigint[] END;
    v_is_cut boolean := cardinality(v_cuts) > 2;
BEGIN
    RETURN QUERY
        SELECT * FROM analytics._user_spans(
            p_from, p_to, p_account, p_by_account, v_is_by_day, v_cuts[1], v_cuts[2] - 1
        )
        UNION ALL
        SELECT * FROM analytics._user_spans(
            p_from, p_to, p_account, p_by_account, v_is_by_day, v_cuts[2], v_cuts[3] - 1
        ) WHERE v_is_cut
        UNION ALL
        SELECT * FROM analytics._user_spans(
            p_from, p_to, p_account, p_by_account, v_is_by_day, v_cuts[3], v_cuts[4] - 1
        ) WHERE v_is_cut
        UNION ALL
        SELECT * FROM analytics._user_spans(
            p_from, p_to, p_account, p_by_account, v_is_by_day, v_cuts[4], v_cuts[5] - 1
        ) WHERE v_is_cut;
END
$$;
COMMENT ON FUNCTION analytics._active_spans(timestamptz, timestamptz, text, boolean) IS
    'The spans of all users, those of different parts of them apart.';

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
        SELECT s.account_id, s.day, s.gap, s.users
        FROM analytics._active_spans(p_read_from, p_read_to, p_account, p_by_account) AS s
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
    FROM analytics._settle_days(p_from, p_to, p_account) AS r;
    -- 30 days end with the first day asked for; 31, since days differ in length.
    v_read_from := spectrum.period_start(
        'day', v_from - CASE WHEN p_from IS NULL THEN interval '0' ELSE interval '31 days' END
    );
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
