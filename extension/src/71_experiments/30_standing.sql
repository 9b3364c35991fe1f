-- Room 71, the answers: analytics.experiment for any question at once, mv_experiment_results for
-- dashboards. Both show what _experiment_results says.

CREATE FUNCTION spectrum._create_experiment_views()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.metrics WITH (security_barrier) AS
    SELECT
        metric, kind, event_type, property, properties_filter, time_window,
        denominator_event_type, denominator_property, denominator_filter, is_guardrail, changed_at
    FROM spectrum.metrics;
    COMMENT ON VIEW analytics.metrics IS 'The defined metrics, for all who may ask questions.';

    CREATE VIEW analytics.experiments WITH (security_barrier) AS
    SELECT
        experiment, variants, control, metrics, starts_at, ends_at, confidence, correction,
        changed_at, winsorize, cuped, sequential
    FROM spectrum.experiments;
    COMMENT ON VIEW analytics.experiments IS
        'The defined experiments, for all who may ask questions.';

    PERFORM spectrum._create_experiment_tables();
    PERFORM spectrum._comment_experiment_results();

    CREATE VIEW analytics.experiment_results WITH (security_barrier) AS
    SELECT
        v.account_id, v.experiment, v.metric, v.variant, v.is_control, v.units, v.excluded_units,
        v.conversions, v.value, v.ci_low, v.ci_high, v.difference, v.difference_low,
        v.difference_high, v.lift, v.lift_low, v.lift_high, v.p_value, v.p_adjusted,
        v.srm_p_value, v.is_reliable, v.kind, v.is_guardrail,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of, v.chance_to_win,
        v.credible_low, v.credible_high, v.expected_loss, v.winsor_low, v.winsor_high, v.theta,
        v.variance_reduction, v.is_sequential
    FROM spectrum.reports AS report
    JOIN analytics.mv_experiment_results AS v USING (report_id)
    WHERE report.kind = 'experiment' AND report.state = 'served'
        AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR v.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.experiment_results IS
        'Each metric of each defined experiment in each variant, compared with control '
        '(account_id *: all accounts).';
    COMMENT ON COLUMN analytics.experiment_results.as_of IS 'Events up to here are counted.';
    PERFORM spectrum._add_kind('experiment', 60, '_maintain_experiment',
        '{spectrum.rollup_experiment_units, spectrum.rollup_experiment_days, '
        'analytics.mv_experiment_totals, analytics.mv_experiment_results}',
        '{experiment_results}');
END
$$;
COMMENT ON FUNCTION spectrum._create_experiment_views() IS
    'Room 71: makes the views of the definitions, and the tables and the plain view of the '
    'standing results.';

CREATE FUNCTION spectrum._create_experiment_tables()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE TABLE spectrum.rollup_experiment_units (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        variant text COLLATE "C",
        exposed_at timestamptz NOT NULL,
        low_variant text COLLATE "C" NOT NULL,
        high_variant text COLLATE "C" NOT NULL,
        frozen_at timestamptz,
        frozen_low text COLLATE "C",
        frozen_high text COLLATE "C",
        CONSTRAINT rollup_experiment_units_pkey PRIMARY KEY (report_id, user_key, scope)
    );
    CREATE INDEX rollup_experiment_units_scope_idx
    ON spectrum.rollup_experiment_units (report_id, scope);
    COMMENT ON TABLE spectrum.rollup_experiment_units IS 'The users that an experiment saw.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.report_id IS
        'spectrum.reports, kind experiment.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.variant IS
        'The one he counts for; NULL: left out.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.exposed_at IS 'First exposure.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.low_variant IS
        'First by name of the variants that he saw; another one than high_variant: several.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.high_variant IS 'Last by name.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.frozen_at IS
        'First of those exposures whose facts are purged; NULL: none.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.frozen_low IS
        'Of these: first by name of the variants.';
    COMMENT ON COLUMN spectrum.rollup_experiment_units.frozen_high IS 'Last by name.';

    CREATE TABLE spectrum.rollup_experiment_days (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        day date NOT NULL,
        metric text COLLATE "C" NOT NULL,
        most integer,
        has_converted boolean NOT NULL,
        x numeric NOT NULL,
        y numeric NOT NULL,
        w numeric NOT NULL,
        v numeric NOT NULL,
        CONSTRAINT rollup_experiment_days_pkey
        PRIMARY KEY (report_id, user_key, scope, day, metric)
    );
    COMMENT ON TABLE spectrum.rollup_experiment_days IS
        'What each counted unit of an experiment did in a day.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.report_id IS
        'spectrum.reports, kind experiment.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.day IS 'In UTC.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.most IS
        'A unit counts no more than this for the metric; NULL: what it did.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.has_converted IS
        'Whether an event of the metric followed the exposure.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.x IS
        'Sum of the metric from the first exposure on.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.y IS 'Of a ratio: that of its denominator.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.w IS 'With CUPED: as x, before.';
    COMMENT ON COLUMN spectrum.rollup_experiment_days.v IS 'As y, before.';

    CREATE TABLE analytics.mv_experiment_totals (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        metric text COLLATE "C" NOT NULL,
        variant text COLLATE "C" NOT NULL,
        units bigint NOT NULL,
        conversions bigint NOT NULL,
        sum_x numeric NOT NULL,
        sum_xx numeric NOT NULL,
        sum_y numeric NOT NULL,
        sum_yy numeric NOT NULL,
        sum_xy numeric NOT NULL,
        sum_w numeric NOT NULL,
        sum_ww numeric NOT NULL,
        sum_v numeric NOT NULL,
        sum_vv numeric NOT NULL,
        sum_wv numeric NOT NULL,
        sum_xw numeric NOT NULL,
        sum_xv numeric NOT NULL,
        sum_yw numeric NOT NULL,
        sum_yv numeric NOT NULL,
        CONSTRAINT mv_experiment_totals_pkey PRIMARY KEY (report_id, account_id, metric, variant)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_experiment_totals IS
        'Sums over the units of each experiment: all that its results are made of.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.report_id IS
        'spectrum.reports, kind experiment.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.metric IS
        'Empty: the row that counts the units of the variant.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.variant IS 'Empty: units that are left out.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.units IS
        'Units; of a metric, those that did anything of it.';
    COMMENT ON COLUMN analytics.mv_experiment_totals.sum_x IS
        'Sums over units of x, y, w and v (rollup_experiment_days) and of products of two.';

    CREATE TABLE analytics.mv_experiment_results (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        experiment text NOT NULL,
        metric text COLLATE "C" NOT NULL,
        variant text COLLATE "C" NOT NULL,
        is_control boolean NOT NULL,
        units bigint NOT NULL,
        excluded_units bigint NOT NULL,
        conversions bigint NOT NULL,
        value double precision,
        ci_low double precision,
        ci_high double precision,
        difference double precision,
        difference_low double precision,
        difference_high double precision,
        lift double precision,
        lift_low double precision,
        lift_high double precision,
        p_value double precision,
        p_adjusted double precision,
        srm_p_value double precision,
        is_reliable boolean NOT NULL,
        kind text NOT NULL,
        is_guardrail boolean NOT NULL,
        chance_to_win double precision,
        credible_low double precision,
        credible_high double precision,
        expected_loss double precision,
        winsor_low numeric,
        winsor_high numeric,
        theta double precision,
        variance_reduction double precision,
        is_sequential boolean NOT NULL,
        CONSTRAINT mv_experiment_results_pkey PRIMARY KEY (report_id, account_id, metric, variant)
    ) WITH (fillfactor = 70);
END
$$;
COMMENT ON FUNCTION spectrum._create_experiment_tables() IS
    'Room 71: makes what standing experiments are kept in.';

CREATE FUNCTION spectrum._comment_experiment_results()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    COMMENT ON TABLE analytics.mv_experiment_results IS
        'Results of the defined experiments, for all accounts together (account_id *) and for each '
        'account with a unit. Read it through analytics.experiment_results.';
    COMMENT ON COLUMN analytics.mv_experiment_results.account_id IS 'Account; * is all accounts.';
    COMMENT ON COLUMN analytics.mv_experiment_results.experiment IS 'Name of the experiment.';
    COMMENT ON COLUMN analytics.mv_experiment_results.metric IS 'Name of the metric.';
    COMMENT ON COLUMN analytics.mv_experiment_results.variant IS 'Planned variant.';
    COMMENT ON COLUMN analytics.mv_experiment_results.is_control IS
        'Whether the others are compared with it.';
    COMMENT ON COLUMN analytics.mv_experiment_results.units IS
        'Users who saw this variant and no other.';
    COMMENT ON COLUMN analytics.mv_experiment_results.excluded_units IS
        'Users of the experiment left out: they saw two variants, or one that is not planned.';
    COMMENT ON COLUMN analytics.mv_experiment_results.conversions IS
        'Units with an event of the metric.';
    COMMENT ON COLUMN analytics.mv_experiment_results.value IS
        'Share of units, mean per unit, or ratio; NULL without units.';
    COMMENT ON COLUMN analytics.mv_experiment_results.ci_low IS 'Lower end of its interval.';
    COMMENT ON COLUMN analytics.mv_experiment_results.ci_high IS 'Upper end of its interval.';
    COMMENT ON COLUMN analytics.mv_experiment_results.difference IS 'value - value of control.';
    COMMENT ON COLUMN analytics.mv_experiment_results.difference_low IS 'Lower end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.difference_high IS 'Upper end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.lift IS 'difference / value of control.';
    COMMENT ON COLUMN analytics.mv_experiment_results.lift_low IS 'Lower end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.lift_high IS 'Upper end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.p_value IS
        'Two-sided, of no difference from control.';
    COMMENT ON COLUMN analytics.mv_experiment_results.p_adjusted IS
        'The same, adjusted over all metrics and variants of the experiment but guardrails.';
    COMMENT ON COLUMN analytics.mv_experiment_results.srm_p_value IS
        'Of units that follow the planned split; below 0.001 the split is broken.';
    COMMENT ON COLUMN analytics.mv_experiment_results.is_reliable IS
        'Whether this arm and control have 50 units and 5 conversions (for a proportion also 5 '
        'without) and the split holds.';
    COMMENT ON COLUMN analytics.mv_experiment_results.kind IS 'proportion, mean or ratio.';
    COMMENT ON COLUMN analytics.mv_experiment_results.is_guardrail IS
        'Watched only: not in the family of adjusted p-values.';
    COMMENT ON COLUMN analytics.mv_experiment_results.chance_to_win IS
        'Probability that the value is above that of control, from the data alone (flat prior).';
    COMMENT ON COLUMN analytics.mv_experiment_results.credible_low IS
        'Lower end of the credible interval of the difference.';
    COMMENT ON COLUMN analytics.mv_experiment_results.credible_high IS 'Upper end.';
    COMMENT ON COLUMN analytics.mv_experiment_results.expected_loss IS
        'What choosing this variant loses on average, if the higher value is the better one.';
    COMMENT ON COLUMN analytics.mv_experiment_results.winsor_low IS
        'Sums of units were cut below here; NULL: not winsorized.';
    COMMENT ON COLUMN analytics.mv_experiment_results.winsor_high IS 'Cut above here.';
    COMMENT ON COLUMN analytics.mv_experiment_results.theta IS
        'Weight of the covariate of CUPED; NULL: not asked for; 0: nothing to adjust by.';
    COMMENT ON COLUMN analytics.mv_experiment_results.variance_reduction IS
        'Share of the variance in this arm that CUPED takes away.';
    COMMENT ON COLUMN analytics.mv_experiment_results.is_sequential IS
        'Whether intervals and p-values hold at every look (always-valid), not at one alone.';
END
$$;
COMMENT ON FUNCTION spectrum._comment_experiment_results() IS
    'Room 71: says what each column of mv_experiment_results means.';

CREATE FUNCTION analytics._standing_experiment_results()
RETURNS TABLE (
    account_id text,
    experiment text,
    metric text,
    variant text,
    is_control boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    value double precision,
    ci_low double precision,
    ci_high double precision,
    difference double precision,
    difference_low double precision,
    difference_high double precision,
    lift double precision,
    lift_low double precision,
    lift_high double precision,
    p_value double precision,
    p_adjusted double precision,
    srm_p_value double precision,
    is_reliable boolean,
    kind text,
    is_guardrail boolean,
    chance_to_win double precision,
    credible_low double precision,
    credible_high double precision,
    expected_loss double precision,
    winsor_low numeric,
    winsor_high numeric,
    theta double precision,
    variance_reduction double precision,
    is_sequential boolean
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT r.*
    FROM (
        SELECT jsonb_populate_record(NULL::analytics._experiment_plan, report.definition) AS plan
        FROM spectrum.reports AS report
        WHERE report.kind = 'experiment' AND report.state = 'served'
    ) AS e
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._experiment_results(
        e.plan,
        ARRAY(
            SELECT t FROM analytics._experiment_totals(
                e.plan,
                CASE WHEN NOT scopes.by_account THEN '*' END,
                ARRAY(
                    SELECT s FROM analytics._experiment_sums(e.plan, NULL, scopes.by_account) AS s
                )
            ) AS t
        )
    ) AS r;
END
$$;
COMMENT ON FUNCTION analytics._standing_experiment_results() IS
    'What analytics.experiment_results has to show, out of all events: for verify().';

CREATE FUNCTION analytics.experiment(
    p_experiment text,
    p_account text DEFAULT NULL,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_confidence double precision DEFAULT NULL,
    p_correction text DEFAULT NULL,
    p_winsorize double precision DEFAULT NULL,
    p_cuped interval DEFAULT NULL,
    p_sequential bigint DEFAULT NULL
)
RETURNS TABLE (
    account_id text,
    experiment text,
    metric text,
    variant text,
    is_control boolean,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    value double precision,
    ci_low double precision,
    ci_high double precision,
    difference double precision,
    difference_low double precision,
    difference_high double precision,
    lift double precision,
    lift_low double precision,
    lift_high double precision,
    p_value double precision,
    p_adjusted double precision,
    srm_p_value double precision,
    is_reliable boolean,
    kind text,
    is_guardrail boolean,
    chance_to_win double precision,
    credible_low double precision,
    credible_high double precision,
    expected_loss double precision,
    winsor_low numeric,
    winsor_high numeric,
    theta double precision,
    variance_reduction double precision,
    is_sequential boolean
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_plan analytics._experiment_plan := analytics._experiment_plan(
        p_experiment, p_from, p_to, p_confidence, p_correction, p_winsorize, p_cuped, p_sequential
    );
BEGIN
    IF v_plan.experiment IS NULL THEN
        PERFORM spectrum._reject(
            'p_experiment', p_experiment, 'the name of an experiment in analytics.experiments'
        );
    END IF;
    PERFORM analytics._check_range(p_from, p_to);
    IF p_confidence IS NOT NULL THEN
        PERFORM analytics._check_confidence(p_confidence);
    END IF;
    IF p_correction IS NOT NULL THEN
        PERFORM spectrum._check_choice(
            'p_correction', p_correction, '{holm, benjamini_hochberg}'
        );
    END IF;
    PERFORM analytics._check_methods(p_winsorize, p_cuped, p_sequential);

    RETURN QUERY
    SELECT r.*
    FROM analytics._experiment_results(
        v_plan,
        ARRAY(
            SELECT t FROM analytics._experiment_totals(
                v_plan,
                coalesce(p_account, '*'),
                ARRAY(SELECT s FROM analytics._experiment_sums(v_plan, p_account, false) AS s)
            ) AS t
        )
    ) AS r
    ORDER BY array_position(v_plan.metrics, r.metric), r.is_control DESC, r.variant;
END
$$;
COMMENT ON FUNCTION analytics.experiment(
    text, text, timestamptz, timestamptz, double precision, text, double precision, interval,
    bigint
) IS
    'Results of a defined experiment, one row a metric and variant, exact over the events: units, '
    'value and interval, difference and lift against control, p-value, p-value adjusted for their '
    'number, p-value of the split. NULL arguments: as the experiment is defined, all accounts. '
    '[p_from, p_to) limits the exposures, and the events of metrics without a window. p_winsorize: '
    'percentile to cut amounts at; p_cuped: how long before the exposure the covariate is '
    'measured; p_sequential: units at which always-valid intervals are narrowest; 1, 0, 0: off.';
