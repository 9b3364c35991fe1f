-- Room 60, retention: of the users who began something in a period, how many come back in the
-- periods after it. Reads analytics.events; read by analytics.retention and the standing
-- retentions.
--
-- A user's history is folded into bit strings, one bit a calendar period (in which he started,
-- in which he returned), in one pass over the events. A cohort's row is a slice of them, so users
-- of the same pattern are counted together.

CREATE FUNCTION analytics._check_retention(
    p_period text, p_periods integer, p_cohort text, p_mode text, p_where jsonb
)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    IF p_periods IS NULL OR p_periods NOT BETWEEN 0 AND 1000 THEN
        PERFORM spectrum._reject('p_periods', p_periods::text, 'a number from 0 to 1000');
    END IF;
    PERFORM spectrum._check_choice('p_cohort', p_cohort, '{first, recurring}');
    PERFORM spectrum._check_choice('p_mode', p_mode, '{on, on_or_after}');
    PERFORM analytics._check_filter('p_where', p_where);
END
$$;
COMMENT ON FUNCTION analytics._check_retention(text, integer, text, text, jsonb) IS
    'Raises 22023 unless the options describe a retention.';

CREATE FUNCTION analytics._retention_users(
    p_start_key integer,
    p_return_key integer,
    p_starts timestamptz[],
    p_is_recurring boolean,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_where jsonb,
    p_by_account boolean,
    p_first_user bigint,
    p_last_user bigint
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    first_start timestamptz,
    started bit varying,
    returned bit varying,
    returned_after bit varying
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_account_key bigint := (
        SELECT a.account_key FROM analytics.accounts AS a WHERE a.account_id = p_account
    );
    v_none bit varying := repeat('0', cardinality(p_starts) - 1)::bit varying;
    -- Where each start is a return itself, there is a return at or after it in its period.
    v_start_returns boolean := p_return_key IS NULL OR coalesce(p_return_key = p_start_key, false);
BEGIN
    -- The arguments are constants of this plan, see _unit_histories. Starts need a bit each, and
    -- the periods to be told apart, only in some retentions.
    RETURN QUERY
    SELECT
        CASE WHEN p_by_account THEN (
            SELECT a.account_id FROM analytics.accounts AS a WHERE a.account_key = f.scope_key
        ) ELSE coalesce(p_account, '*') END,
        f.user_key, min(f.first_start),
        CASE WHEN p_is_recurring THEN bit_or(f.started)::bit varying END,
        coalesce(bit_or(f.returned), v_none)::bit varying,
        coalesce(
            bit_or(f.returned) FILTER (WHERE v_start_returns OR f.last_return >= f.first_start),
            v_none
        )::bit varying
    FROM (
        SELECT CASE WHEN p_by_account THEN e.account_key END AS scope_key, e.user_key,
            min(e.occurred_at) FILTER (WHERE e.is_start) AS first_start,
            CASE WHEN NOT v_start_returns THEN
                max(e.occurred_at) FILTER (WHERE e.is_return)
            END AS last_return,
            CASE WHEN p_is_recurring THEN
                bit_or(set_bit(v_none, e.number - 1, 1)) FILTER (WHERE e.is_start)
            END AS started,
            bit_or(set_bit(v_none, e.number - 1, 1)) FILTER (WHERE e.is_return) AS returned
        FROM (
            SELECT e.account_key, e.user_key, e.occurred_at,
                width_bucket(e.occurred_at, p_starts) AS number,
                (p_start_key IS NULL OR e.event_type_key = p_start_key) AND (
                    NOT p_is_recurring
                    OR ((p_from IS NULL OR e.occurred_at >= p_from)
                        AND (p_to IS NULL OR e.occurred_at < p_to))
                ) AS is_start,
                p_return_key IS NULL OR e.event_type_key = p_return_key AS is_return
            FROM analytics.timelines AS e
            WHERE e.user_key BETWEEN p_first_user AND p_last_user
                AND (
                    p_start_key IS NULL OR p_return_key IS NULL
                    OR e.event_type_key IN (p_start_key, p_return_key)
                )
                AND e.occurred_at >= p_starts[1]
                AND e.occurred_at < p_starts[cardinality(p_starts)]
                AND (p_where IS NULL OR e.properties @> p_where)
                AND (p_account IS NULL OR e.account_key = v_account_key)
                AND (NOT p_by_account OR e.account_key <> 0)
        ) AS e
        GROUP BY
            CASE WHEN p_by_account THEN e.account_key END,
            e.user_key,
            CASE WHEN NOT v_start_returns THEN e.number END
    ) AS f
    GROUP BY f.scope_key, f.user_key
    HAVING min(f.first_start) IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._retention_users(
    integer, integer, timestamptz[], boolean, timestamptz, timestamptz, text, jsonb, boolean,
    bigint, bigint
) IS
    'Each user''s first start and, one bit a period of p_starts: started (if p_is_recurring: in '
    '[p_from, p_to)), returned, and returned at or after the first start of that period. A NULL '
    'key stands for any event. Users from p_first_user to p_last_user.';

CREATE FUNCTION analytics._retention_patterns(
    p_start_key integer,
    p_return_key integer,
    p_starts timestamptz[],
    p_is_recurring boolean,
    p_from timestamptz,
    p_to timestamptz,
    p_account text,
    p_where jsonb,
    p_by_account boolean,
    p_by_day boolean,
    p_first_user bigint,
    p_last_user bigint
)
RETURNS TABLE (
    account_id text,
    first_number integer,
    started bit varying,
    returned bit varying,
    returned_after bit varying,
    users bigint
)
LANGUAGE plpgsql STABLE PARALLEL SAFE COST 100000000 ROWS 10000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    v_days date[] := spectrum.period_dates(p_starts);
    v_is_short boolean := cardinality(p_starts) <= 65;
    v_none bit varying := repeat('0', cardinality(p_starts) - 1)::bit varying;
BEGIN
    IF p_by_day THEN
        -- Any event of all time: each is a start and a return. Up to 64 periods are the bits of a
        -- bigint, which takes half the time.
        RETURN QUERY
        SELECT '*', CASE WHEN NOT p_is_recurring THEN position(B'1' IN p.active) END,
            CASE WHEN p_is_recurring THEN p.active END, p.active, p.active, p.users
        FROM (
            SELECT CASE WHEN v_is_short
                THEN substring(u.active::bit(64)::bit varying FOR cardinality(p_starts) - 1)
                ELSE u.long_active::bit varying END AS active,
                count(*) AS users
            FROM (
                SELECT
                    CASE WHEN v_is_short THEN bit_or(1::bigint << 64 - d.number) END AS active,
                    CASE WHEN NOT v_is_short THEN
                        bit_or(set_bit(v_none, d.number - 1, 1))::text
                    END AS long_active
                FROM (
                    SELECT d.user_key, width_bucket(d.day, v_days) AS number
                    FROM analytics.user_days AS d
                    WHERE d.user_key BETWEEN p_first_user AND p_last_user
                    OFFSET 0
                ) AS d
                GROUP BY d.user_key
            ) AS u
            GROUP BY u.active, u.long_active
        ) AS p;
        RETURN;
    END IF;

    RETURN QUERY
    SELECT u.account_id, n.number, u.started, u.returned, u.returned_after, count(*)
    FROM analytics._retention_users(
        p_start_key, p_return_key, p_starts, p_is_recurring, p_from, p_to, p_account, p_where,
        p_by_account, p_first_user, p_last_user
    ) AS u
    CROSS JOIN LATERAL (
        SELECT CASE WHEN NOT p_is_recurring
            AND (p_from IS NULL OR u.first_start >= p_from)
            AND (p_to IS NULL OR u.first_start < p_to)
        THEN width_bucket(u.first_start, p_starts) END AS number
    ) AS n
    WHERE p_is_recurring OR n.number IS NOT NULL
    GROUP BY u.account_id, n.number, u.started, u.returned, u.returned_after;
END
$$;
COMMENT ON FUNCTION analytics._retention_patterns(
    integer, integer, timestamptz[], boolean, timestamptz, timestamptz, text, jsonb, boolean,
    boolean, bigint, bigint
) IS
    'How many users have the same bits of _retention_users, and (unless p_is_recurring) the same '
    'period of their first start, where that is in [p_from, p_to). p_by_day: for any event of all '
    'time, out of the days that are kept.';

CREATE FUNCTION analytics._retention_cohorts(
    p_start_event text,
    p_return_event text,
    p_period text,
    p_periods integer,
    p_from timestamptz,
    p_to timestamptz,
    p_cohort text,
    p_mode text,
    p_account text,
    p_where jsonb,
    p_by_account boolean
)
RETURNS TABLE (account_id text, cohort timestamptz, active bit varying, users bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_start_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t WHERE t.event_type = p_start_event
    );
    v_return_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t WHERE t.event_type = p_return_event
    );
    v_starts timestamptz[] := (
        SELECT spectrum.period_starts(p_period, m.first_at, m.end_at)
        FROM analytics._event_bounds() AS m
    );
    v_is_recurring boolean := p_cohort = 'recurring';
    v_is_all boolean := p_account IS NULL AND NOT p_by_account;
    v_is_by_day boolean := v_is_all AND analytics._keeps_days(p_from, p_to)
        AND num_nonnulls(p_start_event, p_return_event, p_where, p_from, p_to) = 0;
    v_cuts bigint[] := CASE WHEN v_is_all
        THEN analytics._user_cuts(CASE WHEN NOT v_is_by_day THEN v_starts[1] END)
        ELSE '{1, 9223372036854775807}'::bigint[] END;
    v_is_cut boolean := cardinality(v_cuts) > 2;
    v_none bit varying := repeat('0', p_periods + 1)::bit varying;
    -- Back in the first n periods, by n + 1.
    v_until bit varying[] := ARRAY(
        SELECT rpad(repeat('1', n.number), p_periods + 1, '0')::bit varying
        FROM generate_series(0, p_periods + 1) AS n (number)
    );
BEGIN
    IF v_starts = '{}' OR (p_start_event IS NOT NULL AND v_start_key IS NULL) THEN
        RETURN;
    ELSIF p_return_event IS NOT NULL THEN
        v_return_key := coalesce(v_return_key, -1);
    END IF;
    RETURN QUERY
    SELECT u.account_id, v_starts[c.number],
        CASE WHEN p_mode = 'on' THEN set_bit(
                substring(u.returned || v_none FROM c.number FOR p_periods + 1),
                0, get_bit(u.returned_after, c.number - 1)
            )::bit varying
            WHEN l.number > c.number THEN v_until[least(l.number - c.number, p_periods) + 2]
            ELSE v_until[get_bit(u.returned_after, c.number - 1) + 1]
        END,
        u.users
    FROM (
        SELECT * FROM analytics._retention_patterns(
            v_start_key, v_return_key, v_starts, v_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, v_is_by_day, v_cuts[1], v_cuts[2] - 1
        )
        UNION ALL
        SELECT * FROM analytics._retention_patterns(
            v_start_key, v_return_key, v_starts, v_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, v_is_by_day, v_cuts[2], v_cuts[3] - 1
        ) WHERE v_is_cut
        UNION ALL
        SELECT * FROM analytics._retention_patterns(
            v_start_key, v_return_key, v_starts, v_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, v_is_by_day, v_cuts[3], v_cuts[4] - 1
        ) WHERE v_is_cut
        UNION ALL
        SELECT * FROM analytics._retention_patterns(
            v_start_key, v_return_key, v_starts, v_is_recurring, p_from, p_to, p_account, p_where,
            p_by_account, v_is_by_day, v_cuts[4], v_cuts[5] - 1
        ) WHERE v_is_cut
    ) AS u
    CROSS JOIN LATERAL (SELECT length(rtrim(u.returned::text, '0')) AS number) AS l
    CROSS JOIN LATERAL (
        SELECT u.first_number AS number WHERE NOT v_is_recurring
        UNION ALL
        SELECT n.number FROM generate_series(1, length(u.started)) AS n (number)
        WHERE v_is_recurring AND get_bit(u.started, n.number - 1) = 1
    ) AS c;
END
$$;
COMMENT ON FUNCTION analytics._retention_cohorts(
    text, text, text, integer, timestamptz, timestamptz, text, text, text, jsonb, boolean
) IS
    'What users contribute to a retention, those of one pattern together: the cohorts they are in, '
    'and for each a bit string, bit k (from 0) set if they count as back in period k. For one '
    'account, for all together (*), or, with p_by_account, for each account by itself, out of its '
    'events alone.';

CREATE FUNCTION analytics._retention_report(
    p_start_event text,
    p_return_event text,
    p_period text,
    p_periods integer,
    p_from timestamptz,
    p_to timestamptz,
    p_cohort text,
    p_mode text,
    p_account text,
    p_where jsonb,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    cohort date,
    period integer,
    cohort_size bigint,
    users bigint,
    rate double precision,
    is_complete boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH patterns AS MATERIALIZED (
        SELECT c.account_id, c.cohort, c.active, c.users
        FROM analytics._retention_cohorts(
            p_start_event, p_return_event, p_period, p_periods, p_from, p_to, p_cohort, p_mode,
            p_account, p_where, p_by_account
        ) AS c
    ),
    calendar AS MATERIALIZED (
        SELECT s.starts, spectrum.period_dates(s.starts) AS dates
        FROM (
            SELECT spectrum.period_starts(p_period, min(p.cohort), now() + interval '1 us')
                AS starts
            FROM patterns AS p
            OFFSET 0
        ) AS s
    ),
    sizes AS (
        SELECT p.account_id, p.cohort, sum(p.users)::bigint AS cohort_size
        FROM patterns AS p
        GROUP BY p.account_id, p.cohort
    ),
    counts AS (
        SELECT p.account_id, p.cohort, k.period, sum(p.users)::bigint AS users
        FROM patterns AS p
        JOIN generate_series(0, p_periods) AS k (period) ON get_bit(p.active, k.period) <> 0
        GROUP BY p.account_id, p.cohort, k.period
    ),
    cells AS (
        SELECT s.account_id, s.cohort, k.period, s.cohort_size, coalesce(c.users, 0) AS users
        FROM sizes AS s
        CROSS JOIN generate_series(0, p_periods) AS k (period)
        LEFT JOIN counts AS c
            ON c.account_id = s.account_id AND c.cohort = s.cohort AND c.period = k.period
    )
    SELECT c.account_id, d.dates[n.number], c.period, c.cohort_size, c.users,
        c.users / c.cohort_size::double precision,
        p_mode = 'on' AND d.starts[n.number + c.period + 1] <= now()
    FROM cells AS c
    CROSS JOIN calendar AS d
    CROSS JOIN LATERAL (SELECT width_bucket(c.cohort, d.starts) AS number) AS n
    -- A period that has not begun is no row.
    WHERE d.starts[n.number + c.period] <= now();
END
$$;
COMMENT ON FUNCTION analytics._retention_report(
    text, text, text, integer, timestamptz, timestamptz, text, text, text, jsonb, boolean
) IS
    'Counts the cohorts of each scope by the periods that have begun.';

CREATE FUNCTION analytics._standing_retention(
    p_start_event text,
    p_return_event text,
    p_period text,
    p_periods integer,
    p_from timestamptz,
    p_to timestamptz,
    p_cohort text,
    p_mode text,
    p_where jsonb
)
RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    IF NOT analytics._may_ask_kept() OR p_from <> spectrum.period_start(p_period, p_from)
        OR p_to <> spectrum.period_start(p_period, p_to)
    THEN
        RETURN NULL;
    END IF;
    RETURN (
        SELECT min(report.name)
        FROM analytics.served_reports AS report
        CROSS JOIN LATERAL jsonb_to_record(report.definition) AS same (
            start_event text, return_event text, period_kind text, periods integer,
            cohort_kind text, mode text, properties_filter jsonb
        )
        WHERE report.kind = 'retention' AND report.is_current AND same.periods >= p_periods
            AND (same.start_event, same.return_event, same.period_kind, same.cohort_kind, same.mode)
                IS NOT DISTINCT FROM (p_start_event, p_return_event, p_period, p_cohort, p_mode)
            AND nullif(same.properties_filter, 'null') IS NOT DISTINCT FROM p_where
    );
END
$$;
COMMENT ON FUNCTION analytics._standing_retention(
    text, text, text, integer, timestamptz, timestamptz, text, text, jsonb
) IS
    'The retention in whose standing view the answer is: of this definition, as many periods at '
    'least, and current, where the range is of whole periods. NULL: none.';

CREATE FUNCTION analytics.retention(
    p_start_event text DEFAULT NULL,
    p_return_event text DEFAULT NULL,
    p_period text DEFAULT 'week',
    p_periods integer DEFAULT 12,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_cohort text DEFAULT 'first',
    p_mode text DEFAULT 'on',
    p_account text DEFAULT NULL,
    p_where jsonb DEFAULT NULL
)
RETURNS TABLE (
    cohort date,
    period integer,
    cohort_size bigint,
    users bigint,
    rate double precision,
    is_complete boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
DECLARE
    v_standing text;
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_retention(p_period, p_periods, p_cohort, p_mode, p_where);
    v_standing := analytics._standing_retention(
        p_start_event, p_return_event, p_period, p_periods, p_from, p_to, p_cohort, p_mode, p_where
    );
    -- The account *, all of them to the view, is none to the functions.
    IF v_standing IS NOT NULL AND p_account IS DISTINCT FROM '*' THEN
        RETURN QUERY
        SELECT r.cohort, r.period, r.cohort_size, r.users, r.rate, r.is_complete
        FROM analytics.retention_cohorts AS r
        WHERE r.retention = v_standing AND r.period <= p_periods
            AND r.account_id = coalesce(p_account, '*')
            AND r.cohort >= coalesce(spectrum.period_date(p_from), '-infinity')
            AND r.cohort < coalesce(spectrum.period_date(p_to), 'infinity')
        ORDER BY r.cohort, r.period;
        RETURN;
    END IF;
    RETURN QUERY
    SELECT r.cohort, r.period, r.cohort_size, r.users, r.rate, r.is_complete
    FROM analytics._retention_report(
        p_start_event, p_return_event, p_period, p_periods, p_from, p_to, p_cohort, p_mode,
        p_account, p_where, false
    ) AS r
    ORDER BY r.cohort, r.period;
END
$$;
COMMENT ON FUNCTION analytics.retention(
    text, text, text, integer, timestamptz, timestamptz, text, text, text, jsonb
) IS
    'Retention, exact over all events: of the users whose p_start_event (NULL: any event) falls in '
    'a period, how many have p_return_event in each of the p_periods after it. p_period: day, week '
    'or month. p_cohort: first (the period of the user''s first start ever) or recurring (each '
    'period with a start). p_mode: on (back in the period) or on_or_after (in it or later). '
    '[p_from, p_to) limits the starts, p_where the events: JSON containment in their properties. '
    'Period 0 asks for a return at or after the start. What stands by the same definition, and is '
    'current (analytics.served_reports), is read there.';
