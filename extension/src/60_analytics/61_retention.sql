-- Room 60, retention: of the users who began something in a period, how many come back in the
-- periods after it. Reads analytics.events; read by analytics.retention and the standing
-- retentions.
--
-- A user's history is folded into bit strings, one bit a calendar period (in which he started,
-- in which he returned), in one pass over the events. A cohort's row is a slice of them, so users
-- of the same pattern are counted together.

CREATE FUNCTION spectrum._create_retention()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.retentions') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.retentions (
        retention text NOT NULL CONSTRAINT retentions_pkey PRIMARY KEY,
        start_event text,
        return_event text,
        period_kind text NOT NULL
            CONSTRAINT retentions_period_kind_is_known
            CHECK (period_kind IN ('day', 'week', 'month')),
        periods integer NOT NULL
            CONSTRAINT retentions_periods_range CHECK (periods BETWEEN 0 AND 1000),
        cohort_kind text NOT NULL
            CONSTRAINT retentions_cohort_kind_is_known
            CHECK (cohort_kind IN ('first', 'recurring')),
        mode text NOT NULL
            CONSTRAINT retentions_mode_is_known CHECK (mode IN ('on', 'on_or_after')),
        properties_filter jsonb,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.retentions IS
        'The retentions that analytics.retention_cohorts shows. Define one with '
        'spectrum.define_retention().';
    COMMENT ON COLUMN spectrum.retentions.retention IS 'Name.';
    COMMENT ON COLUMN spectrum.retentions.start_event IS
        'Event that puts a user in a cohort; NULL any.';
    COMMENT ON COLUMN spectrum.retentions.return_event IS
        'Event that counts as coming back; NULL any.';
    COMMENT ON COLUMN spectrum.retentions.period_kind IS 'day, week or month.';
    COMMENT ON COLUMN spectrum.retentions.periods IS 'Last period; the cohort''s own is 0.';
    COMMENT ON COLUMN spectrum.retentions.cohort_kind IS
        'first: by the user''s first start ever; recurring: by each period with a start.';
    COMMENT ON COLUMN spectrum.retentions.mode IS
        'on: back in the period; on_or_after: back in it or later.';
    COMMENT ON COLUMN spectrum.retentions.properties_filter IS
        'Only events whose properties contain this.';
    COMMENT ON COLUMN spectrum.retentions.changed_at IS 'When it was last defined.';
    INSERT INTO spectrum.retentions (retention, period_kind, periods, cohort_kind, mode)
    VALUES ('default', 'week', 12, 'first', 'on');

    CREATE MATERIALIZED VIEW analytics.mv_retention_cohorts AS
    SELECT
        account_id, retention, period_kind, cohort, period, cohort_size, users, rate, is_complete
    FROM analytics._standing_retentions();
    CREATE UNIQUE INDEX mv_retention_cohorts_key
    ON analytics.mv_retention_cohorts (retention, account_id, cohort, period);
    COMMENT ON MATERIALIZED VIEW analytics.mv_retention_cohorts IS
        'Cohorts of each defined retention, for all accounts together (account_id *) and for each '
        'account. Read it through analytics.retention_cohorts.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.account_id IS 'Account; * is all accounts.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.retention IS 'Name of the definition.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.period_kind IS 'day, week or month.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.cohort IS
        'First day of the period in which the users started.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.period IS
        'Periods since then; 0 is the cohort''s own. One that has not begun is no row.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.cohort_size IS 'Users of the cohort.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.users IS 'Those of them who came back.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.rate IS 'users / cohort_size.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.is_complete IS
        'Whether the period has ended; never in mode on_or_after.';

    CREATE VIEW analytics.retention_cohorts AS
    SELECT
        v.account_id, v.retention, v.period_kind, v.cohort, v.period, v.cohort_size, v.users,
        v.rate, v.is_complete, s.as_of
    FROM analytics.mv_retention_cohorts AS v
    LEFT JOIN spectrum.refresh_state AS s ON s.view_name = 'mv_retention_cohorts';
    COMMENT ON VIEW analytics.retention_cohorts IS
        'How many users of each cohort come back, by period (account_id *: all accounts).';
    COMMENT ON COLUMN analytics.retention_cohorts.as_of IS 'Events up to here are counted.';
END
$$;
COMMENT ON FUNCTION spectrum._create_retention() IS
    'Room 60: makes spectrum.retentions with the retention default, mv_retention_cohorts and its '
    'plain view.';

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
    p_start_from timestamptz,
    p_start_to timestamptz,
    p_account text,
    p_where jsonb,
    p_by_account boolean
)
RETURNS TABLE (
    account_id text,
    user_key bigint,
    first_start timestamptz,
    started bit varying,
    returned bit varying,
    returned_after bit varying,
    last_number integer
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_none bit varying := repeat('0', cardinality(p_starts) - 1);
    -- Where each start is a return itself, there is a return at or after it in each period.
    v_start_returns boolean := p_return_key IS NULL OR coalesce(p_return_key = p_start_key, false);
BEGIN
    -- The arguments are constants of this plan, see _unit_histories.
    RETURN QUERY
    SELECT f.scope, f.user_key, min(f.first_start),
        coalesce(bit_or(f.started), v_none)::bit varying,
        coalesce(bit_or(f.returned), v_none)::bit varying,
        coalesce(
            bit_or(f.returned) FILTER (WHERE v_start_returns OR f.last_return >= f.first_start),
            v_none
        )::bit varying,
        max(f.last_number)
    FROM (
        SELECT e.scope_key, e.scope, e.user_key,
            min(e.occurred_at) FILTER (WHERE e.is_start) AS first_start,
            max(e.occurred_at) FILTER (WHERE e.is_return) AS last_return,
            max(e.number) FILTER (WHERE e.is_return) AS last_number,
            bit_or(set_bit(v_none, e.number - 1, 1)) FILTER (WHERE e.is_start) AS started,
            bit_or(set_bit(v_none, e.number - 1, 1)) FILTER (WHERE e.is_return) AS returned
        FROM (
            SELECT
                CASE WHEN p_by_account THEN e.account_key ELSE 0 END AS scope_key,
                CASE WHEN p_by_account THEN e.account_id ELSE coalesce(p_account, '*') END AS scope,
                e.user_key,
                e.occurred_at,
                width_bucket(e.occurred_at, p_starts) AS number,
                (p_start_key IS NULL OR e.event_type_key = p_start_key)
                    AND e.occurred_at >= p_start_from AND e.occurred_at < p_start_to AS is_start,
                p_return_key IS NULL OR e.event_type_key = p_return_key AS is_return
            FROM analytics.events AS e
            WHERE e.user_key <> 0
                AND (
                    p_start_key IS NULL OR p_return_key IS NULL
                    OR e.event_type_key IN (p_start_key, p_return_key)
                )
                AND e.occurred_at >= p_starts[1]
                AND e.occurred_at < p_starts[cardinality(p_starts)]
                AND (p_where IS NULL OR e.properties @> p_where)
                AND (p_account IS NULL OR e.account_id = p_account)
                AND (NOT p_by_account OR e.account_key <> 0)
        ) AS e
        GROUP BY e.scope_key, e.scope, e.user_key,
            CASE WHEN NOT v_start_returns THEN e.number END
    ) AS f
    GROUP BY f.scope_key, f.scope, f.user_key
    HAVING min(f.first_start) IS NOT NULL;
END
$$;
COMMENT ON FUNCTION analytics._retention_users(
    integer, integer, timestamptz[], timestamptz, timestamptz, text, jsonb, boolean
) IS
    'Each user''s starts and returns, one bit a period of p_starts; returned_after: with a return '
    'at or after the first start in the period. last_number: the last period with a return. A NULL '
    'key stands for any event.';

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
RETURNS TABLE (account_id text, user_key bigint, cohort timestamptz, active bit varying)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET jit = off
AS $$
DECLARE
    v_from timestamptz := coalesce(p_from, '-infinity');
    v_to timestamptz := coalesce(p_to, 'infinity');
    v_is_first boolean := p_cohort = 'first';
    v_start_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type = p_start_event
    );
    v_return_key integer := (
        SELECT t.event_type_key FROM analytics.event_types AS t
        WHERE t.event_type = p_return_event
    );
    v_starts timestamptz[];
    v_none bit varying := repeat('0', p_periods + 1);
    -- Back in the first n periods, by n + 1.
    v_until bit varying[] := ARRAY(
        SELECT rpad(repeat('1', n.number), p_periods + 1, '0')::bit varying
        FROM generate_series(0, p_periods + 1) AS n (number)
    );
BEGIN
    IF p_start_event IS NOT NULL AND v_start_key IS NULL THEN
        RETURN;
    ELSIF p_return_event IS NOT NULL THEN
        v_return_key := coalesce(v_return_key, -1);
    END IF;
    SELECT spectrum.period_starts(p_period, b.first_at, b.last_at + interval '1 us') INTO v_starts
    FROM analytics._event_bounds(NULL) AS b;

    RETURN QUERY
    SELECT u.account_id, u.user_key, v_starts[c.number],
        CASE
            WHEN p_mode = 'on' THEN set_bit(
                substring(u.returned || v_none FROM c.number FOR p_periods + 1),
                0, get_bit(u.returned_after, c.number - 1)
            )::bit varying
            WHEN u.last_number > c.number THEN
                v_until[least(u.last_number - c.number, p_periods) + 2]
            ELSE v_until[get_bit(u.returned_after, c.number - 1) + 1]
        END
    FROM analytics._retention_users(
        v_start_key, v_return_key, v_starts,
        CASE WHEN v_is_first THEN '-infinity' ELSE v_from END,
        CASE WHEN v_is_first THEN 'infinity' ELSE v_to END,
        p_account, p_where, p_by_account
    ) AS u
    CROSS JOIN LATERAL (
        SELECT width_bucket(u.first_start, v_starts) AS number
        WHERE v_is_first AND u.first_start >= v_from AND u.first_start < v_to
        UNION ALL
        SELECT n.number FROM generate_series(1, length(u.started)) AS n (number)
        WHERE NOT v_is_first AND get_bit(u.started, n.number - 1) = 1
    ) AS c;
END
$$;
COMMENT ON FUNCTION analytics._retention_cohorts(
    text, text, text, integer, timestamptz, timestamptz, text, text, text, jsonb, boolean
) IS
    'What each user contributes to a retention: the cohorts he is in, and for each a bit string, '
    'bit k (from 0) set if he counts as back in period k. For one account, for all together (*), '
    'or, with p_by_account, for each account by itself, out of its events alone.';

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
        SELECT c.account_id, c.cohort, c.active, count(*) AS users
        FROM analytics._retention_cohorts(
            p_start_event, p_return_event, p_period, p_periods, p_from, p_to, p_cohort, p_mode,
            p_account, p_where, p_by_account
        ) AS c
        GROUP BY c.account_id, c.cohort, c.active
    ),
    calendar AS MATERIALIZED (
        SELECT spectrum.period_starts(p_period, min(p.cohort), now() + interval '1 us') AS starts
        FROM patterns AS p
    ),
    cells AS (
        SELECT p.account_id, p.cohort, k.period,
            sum(p.users)::bigint AS cohort_size,
            coalesce(sum(p.users) FILTER (WHERE get_bit(p.active, k.period) = 1), 0)::bigint
                AS users
        FROM patterns AS p
        CROSS JOIN generate_series(0, p_periods) AS k (period)
        GROUP BY p.account_id, p.cohort, k.period
    )
    SELECT c.account_id, spectrum.period_date(c.cohort), c.period, c.cohort_size, c.users,
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
AS $$
BEGIN
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_retention(p_period, p_periods, p_cohort, p_mode, p_where);
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
    'Period 0 asks for a return at or after the start.';

CREATE FUNCTION analytics._standing_retentions()
RETURNS TABLE (
    account_id text,
    retention text,
    period_kind text,
    cohort date,
    period integer,
    cohort_size bigint,
    users bigint,
    rate double precision,
    is_complete boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.account_id, d.retention, d.period_kind, r.cohort, r.period, r.cohort_size, r.users,
        r.rate, r.is_complete
    FROM spectrum.retentions AS d
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._retention_report(
        d.start_event, d.return_event, d.period_kind, d.periods, NULL, NULL, d.cohort_kind,
        d.mode, NULL, d.properties_filter, scopes.by_account
    ) AS r;
END
$$;
COMMENT ON FUNCTION analytics._standing_retentions() IS
    'The rows of mv_retention_cohorts: each definition for all accounts together and for each.';

CREATE FUNCTION spectrum.define_retention(
    p_name text,
    p_start_event text DEFAULT NULL,
    p_return_event text DEFAULT NULL,
    p_period text DEFAULT 'week',
    p_periods integer DEFAULT 12,
    p_cohort text DEFAULT 'first',
    p_mode text DEFAULT 'on',
    p_where jsonb DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_retention(p_period, p_periods, p_cohort, p_mode, p_where);
    DELETE FROM spectrum.retentions WHERE retention = p_name;
    INSERT INTO spectrum.retentions (
        retention, start_event, return_event, period_kind, periods, cohort_kind, mode,
        properties_filter
    )
    VALUES (
        p_name, p_start_event, p_return_event, p_period, p_periods, p_cohort, p_mode, p_where
    );
    PERFORM spectrum._mark_stale('mv_retention_cohorts');
END
$$;
COMMENT ON FUNCTION spectrum.define_retention(
    text, text, text, text, integer, text, text, jsonb
) IS
    'Defines a standing retention or replaces it; the options are those of analytics.retention. '
    'The next refresh shows it in analytics.retention_cohorts.';

CREATE FUNCTION spectrum.drop_retention(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.retentions WHERE retention = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a name in spectrum.retentions');
    END IF;
    PERFORM spectrum._mark_stale('mv_retention_cohorts');
END
$$;
COMMENT ON FUNCTION spectrum.drop_retention(text) IS
    'Removes a standing retention; the next refresh removes its rows.';
