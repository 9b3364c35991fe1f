-- Room 60, standing retentions: the user's own definitions, and the view that shows them. Read by
-- dashboards. The numbers are those of analytics.retention: the same cohorts, counted the same way.

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

    CREATE TABLE spectrum.rollup_retention_days (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        day date NOT NULL,
        first_start timestamptz,
        last_return timestamptz,
        CONSTRAINT rollup_retention_days_pkey PRIMARY KEY (report_id, user_key, scope, day)
    );
    COMMENT ON TABLE spectrum.rollup_retention_days IS
        'What each user did in a day for a retention of certain events. Those of any events are '
        'kept by rollup_user_days.';
    COMMENT ON COLUMN spectrum.rollup_retention_days.report_id IS
        'spectrum.reports, kind retention.';
    COMMENT ON COLUMN spectrum.rollup_retention_days.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_retention_days.first_start IS
        'First start event of the day; NULL none.';
    COMMENT ON COLUMN spectrum.rollup_retention_days.last_return IS
        'Last return event of the day; NULL none.';

    CREATE TABLE analytics.mv_retention_cohorts (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        cohort date NOT NULL,
        cohort_size bigint NOT NULL,
        users bigint[] NOT NULL,
        period_ends timestamptz[] NOT NULL,
        CONSTRAINT mv_retention_cohorts_pkey PRIMARY KEY (report_id, account_id, cohort)
    ) WITH (fillfactor = 70);
    COMMENT ON TABLE analytics.mv_retention_cohorts IS
        'Cohorts of each defined retention, for all accounts together (account_id *) and for each '
        'account, kept by refreshes. Read it through analytics.retention_cohorts.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.report_id IS
        'spectrum.reports, kind retention.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.cohort IS
        'First day of the period in which the users started.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.cohort_size IS 'Users of the cohort.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.users IS
        'Element k + 1: those who count as back k periods later.';
    COMMENT ON COLUMN analytics.mv_retention_cohorts.period_ends IS
        'Element k + 1: when the period k periods later ends.';

    CREATE VIEW analytics.retention_cohorts WITH (security_barrier) AS
    SELECT
        sums.account_id,
        report.name AS retention,
        report.definition ->> 'period_kind' AS period_kind,
        sums.cohort,
        back.number::integer - 1 AS period,
        sums.cohort_size,
        back.users,
        back.users / sums.cohort_size::double precision AS rate,
        report.definition ->> 'mode' = 'on' AND back.ends_at <= now() AS is_complete,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_retention_cohorts AS sums USING (report_id)
    CROSS JOIN LATERAL unnest(sums.users, sums.period_ends) WITH ORDINALITY
        AS back (users, ends_at, number)
    -- A period that has not begun is no row.
    WHERE report.kind = 'retention' AND report.state = 'served'
        AND (back.number = 1 OR sums.period_ends[back.number - 1] <= now())
        AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR sums.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.retention_cohorts IS
        'How many users of each cohort come back, by period (account_id *: all accounts).';
    COMMENT ON COLUMN analytics.retention_cohorts.cohort IS
        'First day of the period in which the users started.';
    COMMENT ON COLUMN analytics.retention_cohorts.period IS
        'Periods since then; 0 is the cohort''s own. One that has not begun is no row.';
    COMMENT ON COLUMN analytics.retention_cohorts.users IS 'Users back in the period.';
    COMMENT ON COLUMN analytics.retention_cohorts.rate IS 'users / cohort_size.';
    COMMENT ON COLUMN analytics.retention_cohorts.is_complete IS
        'Whether the period has ended; never in mode on_or_after.';
    PERFORM spectrum._add_kind('retention', 40, '_maintain_retention',
        '{spectrum.rollup_retention_days, analytics.mv_retention_cohorts}', '{retention_cohorts}');
    PERFORM spectrum._begin_report('retention', 'default', to_jsonb(definition))
    FROM spectrum.retentions AS definition;
END
$$;
COMMENT ON FUNCTION spectrum._create_retention() IS
    'Room 60: makes spectrum.retentions with the retention default, mv_retention_cohorts and its '
    'plain view.';

CREATE FUNCTION analytics._standing_retention_cohorts()
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
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.account_id, d.retention, d.period_kind, r.cohort, r.period, r.cohort_size, r.users,
        r.rate, r.is_complete
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL jsonb_populate_record(NULL::spectrum.retentions, report.definition) AS d
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._retention_report(
        d.start_event, d.return_event, d.period_kind, d.periods, NULL, NULL, d.cohort_kind,
        d.mode, NULL, d.properties_filter, scopes.by_account
    ) AS r
    WHERE report.kind = 'retention' AND report.state = 'served';
END
$$;
COMMENT ON FUNCTION analytics._standing_retention_cohorts() IS
    'What analytics.retention_cohorts has to show, out of all events: for verify().';

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
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_retention(p_period, p_periods, p_cohort, p_mode, p_where);
    -- First of all: who defines the name meanwhile is waited for, and replaced.
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.retentions WHERE retention = p_name;
    INSERT INTO spectrum.retentions (
        retention, start_event, return_event, period_kind, periods, cohort_kind, mode,
        properties_filter
    )
    VALUES (
        p_name, p_start_event, p_return_event, p_period, p_periods, p_cohort, p_mode, p_where
    );
    PERFORM spectrum._begin_report('retention', p_name, to_jsonb(definition))
    FROM spectrum.retentions AS definition WHERE retention = p_name;
END
$$;
COMMENT ON FUNCTION spectrum.define_retention(
    text, text, text, text, integer, text, text, jsonb
) IS
    'Defines a standing retention or replaces it; the options are those of analytics.retention. '
    'The next refresh shows it in analytics.retention_cohorts.';

CREATE FUNCTION spectrum.drop_retention(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.retentions WHERE retention = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a name in spectrum.retentions');
    END IF;
    PERFORM spectrum._discard_reports('retention', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_retention(text) IS
    'Removes a standing retention; the next refresh removes its rows.';
