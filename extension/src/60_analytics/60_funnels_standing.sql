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

    CREATE MATERIALIZED VIEW analytics.mv_conversion_funnels AS
    SELECT
        account_id, funnel, step, event_type, users, rate_from_start, rate_from_previous,
        median_seconds, mean_seconds, breakdown, unit
    FROM analytics._standing_funnels();
    CREATE UNIQUE INDEX mv_conversion_funnels_key
    ON analytics.mv_conversion_funnels (funnel, account_id, breakdown, step);
    COMMENT ON MATERIALIZED VIEW analytics.mv_conversion_funnels IS
        'Steps of each defined funnel, for all accounts together (account_id *) and for each '
        'account with an entry. Read it through analytics.conversion_funnels.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.account_id IS 'Account; * is all accounts.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.funnel IS 'Name of the definition.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.step IS 'Number of the step, from 1.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.event_type IS 'Event of the step.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.users IS
        'Users (accounts, sessions: see unit) that reached the step; 0 where nobody did.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.rate_from_start IS
        'users / users of step 1; 0 where there are none.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.rate_from_previous IS
        'users / users of the previous step; 0 where there are none.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.median_seconds IS
        'Median time from the previous step, of those who took this one.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.mean_seconds IS 'Mean of the same.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.breakdown IS
        'Value of the breakdown; empty where there is none.';
    COMMENT ON COLUMN analytics.mv_conversion_funnels.unit IS
        'What is counted: user, account or session.';

    CREATE VIEW analytics.conversion_funnels AS
    SELECT
        v.account_id, v.funnel, v.step, v.event_type, v.users, v.rate_from_start,
        v.rate_from_previous, v.median_seconds, v.mean_seconds,
        nullif(v.breakdown, '') AS breakdown, v.unit, s.as_of
    FROM analytics.mv_conversion_funnels AS v
    LEFT JOIN spectrum.refresh_state AS s ON s.view_name = 'mv_conversion_funnels';
    COMMENT ON VIEW analytics.conversion_funnels IS
        'How many get from step to step of each defined funnel (account_id *: all accounts). One '
        'row a step, and a value of the breakdown where the funnel has one.';
    COMMENT ON COLUMN analytics.conversion_funnels.breakdown IS 'NULL: none, or an event without.';
    COMMENT ON COLUMN analytics.conversion_funnels.as_of IS 'Events up to here are counted.';

    CREATE MATERIALIZED VIEW analytics.mv_funnel_days AS
    SELECT account_id, funnel, day, step, users FROM analytics._standing_funnel_days();
    CREATE UNIQUE INDEX mv_funnel_days_key
    ON analytics.mv_funnel_days (funnel, account_id, day, step);
    COMMENT ON MATERIALIZED VIEW analytics.mv_funnel_days IS
        'The standing funnels by the day of entry: summed over the days they are the whole. Days '
        'with an entry only. Read it through analytics.funnel_days.';
    COMMENT ON COLUMN analytics.mv_funnel_days.account_id IS 'Account; * is all accounts.';
    COMMENT ON COLUMN analytics.mv_funnel_days.funnel IS 'Name of the definition.';
    COMMENT ON COLUMN analytics.mv_funnel_days.day IS
        'Calendar day, in config.timezone, of step 1 of the counted entry.';
    COMMENT ON COLUMN analytics.mv_funnel_days.step IS 'Number of the step, from 1.';
    COMMENT ON COLUMN analytics.mv_funnel_days.users IS
        'Users (accounts, sessions) that entered on the day and reached the step, whenever.';

    CREATE VIEW analytics.funnel_days AS
    SELECT v.account_id, v.funnel, v.day, v.step, v.users, s.as_of
    FROM analytics.mv_funnel_days AS v
    LEFT JOIN spectrum.refresh_state AS s ON s.view_name = 'mv_funnel_days';
    COMMENT ON VIEW analytics.funnel_days IS
        'Each defined funnel by the day of entry (account_id *: all accounts).';
    COMMENT ON COLUMN analytics.funnel_days.as_of IS 'Events up to here are counted.';
END
$$;
COMMENT ON FUNCTION spectrum._create_funnels() IS
    'Room 60: makes spectrum.funnels, the standing funnels and their plain views.';

CREATE FUNCTION analytics._standing_funnels()
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
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.account_id, f.funnel, coalesce(r.breakdown, ''), f.unit, r.step, r.event_type,
        r.units, r.rate_from_start, r.rate_from_previous, r.median_seconds, r.mean_seconds
    FROM spectrum.funnels AS f
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._funnel_report(
        f.steps, NULL, NULL, f.time_window, f.step_order, f.entry, f.unit, NULL, f.breakdown,
        f.attribution, f.exclusions, scopes.by_account
    ) AS r;
END
$$;
COMMENT ON FUNCTION analytics._standing_funnels() IS
    'The rows of mv_conversion_funnels: each definition for all accounts together and for each.';

CREATE FUNCTION analytics._standing_funnel_days()
RETURNS TABLE (account_id text, funnel text, day date, step integer, users bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH entries AS MATERIALIZED (
        SELECT e.account_id, f.funnel, f.steps, e.step_times[1] AS entered_at,
            cardinality(e.step_times) AS reached
        FROM spectrum.funnels AS f
        CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
        CROSS JOIN LATERAL analytics._funnel_entries(
            f.steps, NULL, NULL, f.time_window, f.step_order, f.entry, f.unit, NULL, NULL,
            f.attribution, f.exclusions, scopes.by_account
        ) AS e
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
    'The rows of mv_funnel_days: the same entries, by their day.';

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
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_funnel(
        p_steps, p_window, p_order, p_entry, p_unit, p_breakdown, p_attribution, p_exclude
    );
    DELETE FROM spectrum.funnels WHERE funnel = p_name;
    INSERT INTO spectrum.funnels (
        funnel, steps, time_window, step_order, entry, unit, breakdown, attribution, exclusions
    )
    VALUES (
        p_name, p_steps, p_window, p_order, p_entry, p_unit, p_breakdown, p_attribution, p_exclude
    );
    PERFORM spectrum._mark_stale('mv_conversion_funnels');
    PERFORM spectrum._mark_stale('mv_funnel_days');
END
$$;
COMMENT ON FUNCTION spectrum.define_funnel(
    text, jsonb, interval, text, text, text, text, text, jsonb
) IS
    'Defines a standing funnel or replaces it; the options are those of analytics.funnel. The next '
    'refresh shows it in analytics.conversion_funnels and analytics.funnel_days.';

CREATE FUNCTION spectrum.drop_funnel(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.funnels WHERE funnel = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a name in spectrum.funnels');
    END IF;
    PERFORM spectrum._mark_stale('mv_conversion_funnels');
    PERFORM spectrum._mark_stale('mv_funnel_days');
END
$$;
COMMENT ON FUNCTION spectrum.drop_funnel(text) IS
    'Removes a standing funnel; the next refresh removes its rows.';
