-- Room 60, standing funnels: the user's own definitions, and the views that show them. Read by
-- dashboards. The numbers are those of analytics.funnel: the same entries, counted the same way.

CREATE FUNCTION spectrum._create_funnels()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.funnels') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.funnels (
        funnel text NOT NULL CONSTRAINT funnels_pkey PRIMARY KEY,
        steps jsonb NOT NULL,
        time_window interval NOT NULL,
        step_order text NOT NULL
            CONSTRAINT funnels_step_order_is_known
            CHECK (step_order IN ('ordered', 'strict', 'any')),
        entry text NOT NULL
            CONSTRAINT funnels_entry_is_known CHECK (entry IN ('best', 'first')),
        unit text NOT NULL
            CONSTRAINT funnels_unit_is_known CHECK (unit IN ('user', 'account', 'session')),
        breakdown text,
        attribution text NOT NULL
            CONSTRAINT funnels_attribution_is_known CHECK (attribution IN ('first', 'last')),
        exclusions jsonb,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.funnels IS
        'The funnels that analytics.conversion_funnels shows. Define one with '
        'spectrum.define_funnel().';
    COMMENT ON COLUMN spectrum.funnels.funnel IS 'Name.';
    COMMENT ON COLUMN spectrum.funnels.steps IS
        'Array of events: "event type" or {"event": "event type", "where": {...}}.';
    COMMENT ON COLUMN spectrum.funnels.time_window IS 'Longest time from step 1 to a later step.';
    COMMENT ON COLUMN spectrum.funnels.step_order IS 'ordered, strict or any.';
    COMMENT ON COLUMN spectrum.funnels.entry IS 'Which entry of a unit counts: best or first.';
    COMMENT ON COLUMN spectrum.funnels.unit IS 'What is counted: user, account or session.';
    COMMENT ON COLUMN spectrum.funnels.breakdown IS
        'country, region, city, account_id or a property; NULL none.';
    COMMENT ON COLUMN spectrum.funnels.attribution IS
        'Where the breakdown is read: first or last step reached.';
    COMMENT ON COLUMN spectrum.funnels.exclusions IS 'Events that void an entry, written as steps.';
    COMMENT ON COLUMN spectrum.funnels.changed_at IS 'When it was last defined.';

    CREATE TABLE spectrum.rollup_funnel_entries (
        report_id integer NOT NULL,
        unit bigint NOT NULL,
        scope bigint NOT NULL,
        session_start timestamptz NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        step_times timestamptz[] NOT NULL,
        CONSTRAINT rollup_funnel_entries_pkey PRIMARY KEY (report_id, unit, scope, session_start)
    );
    COMMENT ON TABLE spectrum.rollup_funnel_entries IS
        'The one entry of each unit that a funnel counts.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.report_id IS 'spectrum.reports, kind funnel.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.unit IS
        'dim_users; dim_accounts where the funnel counts accounts.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.session_start IS
        'Of a session; -infinity where sessions are not counted.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.breakdown IS 'Empty where there is none.';
    COMMENT ON COLUMN spectrum.rollup_funnel_entries.step_times IS
        'When it reached step 1, step 2, ...; as long as the entry came.';

    CREATE TABLE spectrum.rollup_funnel_seconds (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        step integer NOT NULL,
        microseconds bigint NOT NULL,
        units bigint NOT NULL,
        CONSTRAINT rollup_funnel_seconds_pkey
        PRIMARY KEY (report_id, account_id, breakdown, step, microseconds)
    );
    COMMENT ON TABLE spectrum.rollup_funnel_seconds IS
        'How many units took how long from the step before: what medians are found in.';
    COMMENT ON COLUMN spectrum.rollup_funnel_seconds.report_id IS 'spectrum.reports, kind funnel.';

    CREATE TABLE analytics.mv_conversion_funnels (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        breakdown text COLLATE "C" NOT NULL,
        step integer NOT NULL,
        users bigint NOT NULL DEFAULT 0,
        microseconds numeric NOT NULL DEFAULT 0,
        below bigint NOT NULL DEFAULT 0,
        lower_median bigint,
        median_seconds double precision,
        CONSTRAINT mv_conversion_funnels_pkey
        PRIMARY KEY (report_id, account_id, breakdown, step)
    ) WITH (fillfactor = 70);
    COMMENT ON TABLE analytics.mv_conversion_funnels IS
        'Steps of each defined funnel, for all accounts together (account_id *) and for each '
        'account with an entry, kept by refreshes. Read it through analytics.conversion_funnels.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.report_id IS 'spectrum.reports, kind funnel.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.breakdown IS
        'Value of the breakdown; empty where there is none.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.users IS
        'Users (accounts, sessions) that reached the step; 0 where nobody did.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.microseconds IS
        'Sum of the times from the previous step.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.below IS
        'Units that took less time than lower_median.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.lower_median IS
        'The middle of the times, in microseconds: the lower one where there are two.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.median_seconds IS
        'Half way between it and the upper one, in seconds.';

    CREATE TABLE analytics.mv_funnel_days (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        step integer NOT NULL,
        users bigint NOT NULL,
        CONSTRAINT mv_funnel_days_pkey PRIMARY KEY (report_id, account_id, day, step)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_funnel_days IS
        'The standing funnels by the day of entry: summed over the days they are the whole. Days '
        'with an entry only. Read it through analytics.funnel_days.';
    COMMENT ON COLUMN analytics.mv_funnel_days.report_id IS 'spectrum.reports, kind funnel.';
    COMMENT ON COLUMN analytics.mv_funnel_days.day IS
        'Calendar day, in config.timezone, of step 1 of the counted entry.';
    COMMENT ON COLUMN analytics.mv_funnel_days.users IS
        'Users (accounts, sessions) that entered on the day and reached the step, whenever.';
    PERFORM spectrum._create_funnel_views();
    PERFORM spectrum._add_kind('funnel', 50, '_maintain_funnel',
        '{spectrum.rollup_funnel_entries, spectrum.rollup_frozen_entries, '
        'spectrum.rollup_funnel_seconds, analytics.mv_conversion_funnels, '
        'analytics.mv_funnel_days}',
        '{conversion_funnels, funnel_days}');
END
$$;
COMMENT ON FUNCTION spectrum._create_funnels() IS
    'Room 60: makes spectrum.funnels, the tables of the standing funnels and their plain views.';

CREATE FUNCTION spectrum._create_funnel_views()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.conversion_funnels WITH (security_barrier) AS
    SELECT
        sums.account_id,
        report.name AS funnel,
        sums.step,
        coalesce(report.definition -> 'steps' -> (sums.step - 1) ->> 'event',
            report.definition -> 'steps' ->> (sums.step - 1)) AS event_type,
        sums.users,
        coalesce(sums.users / nullif(first_value(sums.users) OVER steps, 0)::double precision, 0)
            AS rate_from_start,
        coalesce(sums.users / nullif(lag(sums.users, 1, sums.users) OVER steps, 0)
            ::double precision, 0) AS rate_from_previous,
        sums.median_seconds,
        CASE WHEN sums.step > 1 THEN
            (sums.microseconds / nullif(sums.users, 0) / 1e6)::double precision
        END AS mean_seconds,
        nullif(sums.breakdown, '') AS breakdown,
        report.definition ->> 'unit' AS unit,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_conversion_funnels AS sums USING (report_id)
    WHERE report.kind = 'funnel' AND report.state = 'served'
        AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR sums.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)))
    WINDOW steps AS (PARTITION BY report.name, sums.account_id, sums.breakdown ORDER BY sums.step);
    COMMENT ON VIEW analytics.conversion_funnels IS
        'How many get from step to step of each defined funnel (account_id *: all accounts). One '
        'row a step, and a value of the breakdown where the funnel has one.';
    COMMENT ON COLUMN analytics.conversion_funnels.users IS
        'Users (accounts, sessions: see unit) that reached the step; 0 where nobody did.';
    COMMENT ON COLUMN analytics.conversion_funnels.rate_from_start IS
        'users / users of step 1; 0 where there are none.';
    COMMENT ON COLUMN analytics.conversion_funnels.rate_from_previous IS
        'users / users of the previous step; 0 where there are none.';
    COMMENT ON COLUMN analytics.conversion_funnels.median_seconds IS
        'Median time from the previous step, of those who took this one.';
    COMMENT ON COLUMN analytics.conversion_funnels.mean_seconds IS 'Their mean time.';
    COMMENT ON COLUMN analytics.conversion_funnels.unit IS
        'What is counted: user, account or session.';

    CREATE VIEW analytics.funnel_days WITH (security_barrier) AS
    SELECT
        sums.account_id,
        report.name AS funnel,
        sums.day,
        sums.step,
        sums.users,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_funnel_days AS sums USING (report_id)
    WHERE report.kind = 'funnel' AND report.state = 'served'
        AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR sums.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.funnel_days IS
        'Each defined funnel by the day of entry (account_id *: all accounts).';
END
$$;
COMMENT ON FUNCTION spectrum._create_funnel_views() IS
    'Room 60: makes the plain views of the standing funnels.';

CREATE FUNCTION analytics._standing_conversion_funnels()
RETURNS TABLE (
    account_id text,
    funnel text,
    breakdown text,
    unit text,
    step integer,
    event_type text,
    users bigint,
    rate_from_start double precision,
    rate_from_previous double precision,
    median_seconds double precision,
    mean_seconds double precision
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.account_id, f.funnel, r.breakdown, f.unit, r.step, r.event_type,
        r.units, r.rate_from_start, r.rate_from_previous, r.median_seconds, r.mean_seconds
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.funnels, report.definition) AS f
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._funnel_report(
        f.steps, NULL, NULL, f.time_window, f.step_order, f.entry, f.unit, NULL, f.breakdown,
        f.attribution, f.exclusions, scopes.by_account
    ) AS r
    WHERE report.kind = 'funnel' AND report.state = 'served';
END
$$;
COMMENT ON FUNCTION analytics._standing_conversion_funnels() IS
    'What analytics.conversion_funnels has to show, out of all events: for verify().';

CREATE FUNCTION analytics._standing_funnel_days()
RETURNS TABLE (account_id text, funnel text, day date, step integer, users bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH entries AS MATERIALIZED (
        SELECT e.account_id, f.funnel, f.steps, e.step_times[1] AS entered_at,
            cardinality(e.step_times) AS reached
        FROM spectrum.reports AS report
        CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.funnels, report.definition) AS f
        CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
        CROSS JOIN LATERAL analytics._funnel_entries(
            f.steps, NULL, NULL, f.time_window, f.step_order, f.entry, f.unit, NULL, NULL,
            f.attribution, f.exclusions, scopes.by_account
        ) AS e
        WHERE report.kind = 'funnel' AND report.state = 'served'
    ),
    day_starts AS MATERIALIZED (
        SELECT spectrum.period_starts(
            'day', min(e.entered_at), max(e.entered_at) + interval '1 us'
        ) AS starts
        FROM entries AS e
    ),
    levels AS (
        SELECT e.account_id, e.funnel, e.steps, e.reached, count(*) AS users,
            d.starts[width_bucket(e.entered_at, d.starts)] AS day_start
        FROM entries AS e
        CROSS JOIN day_starts AS d
        GROUP BY e.account_id, e.funnel, e.steps, e.reached, day_start
    )
    SELECT l.account_id, l.funnel, spectrum.period_date(l.day_start), s.step,
        coalesce(sum(l.users) FILTER (WHERE l.reached >= s.step), 0)::bigint
    FROM levels AS l
    CROSS JOIN LATERAL generate_series(1, jsonb_array_length(l.steps)) AS s (step)
    GROUP BY l.account_id, l.funnel, l.day_start, s.step;
END
$$;
COMMENT ON FUNCTION analytics._standing_funnel_days() IS
    'What analytics.funnel_days has to show, out of all events: for verify().';

CREATE FUNCTION spectrum.define_funnel(
    p_name text,
    p_steps jsonb,
    p_window interval DEFAULT '14 days',
    p_order text DEFAULT 'ordered',
    p_entry text DEFAULT 'best',
    p_unit text DEFAULT 'user',
    p_breakdown text DEFAULT NULL,
    p_attribution text DEFAULT 'first',
    p_exclude jsonb DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_funnel(
        p_steps, p_window, p_order, p_entry, p_unit, p_breakdown, p_attribution, p_exclude
    );
    -- First of all: who defines the name meanwhile is waited for, and replaced.
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.funnels WHERE funnel = p_name;
    INSERT INTO spectrum.funnels (
        funnel, steps, time_window, step_order, entry, unit, breakdown, attribution, exclusions
    )
    VALUES (
        p_name, p_steps, p_window, p_order, p_entry, p_unit, p_breakdown, p_attribution, p_exclude
    );
    PERFORM spectrum._begin_report('funnel', p_name, to_jsonb(definition))
    FROM spectrum.funnels AS definition WHERE funnel = p_name;
END
$$;
COMMENT ON FUNCTION spectrum.define_funnel(
    text, jsonb, interval, text, text, text, text, text, jsonb
) IS
    'Defines a standing funnel or replaces it; the options are those of analytics.funnel. The next '
    'refresh shows it in analytics.conversion_funnels and analytics.funnel_days.';

CREATE FUNCTION spectrum.drop_funnel(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.funnels WHERE funnel = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a name in spectrum.funnels');
    END IF;
    PERFORM spectrum._discard_reports('funnel', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_funnel(text) IS
    'Removes a standing funnel.';
