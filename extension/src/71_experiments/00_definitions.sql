-- Room 71, definitions: metrics, and the experiments that are judged by them. Rows of the user's
-- own, checked when they are defined; a name defined again is replaced. Read by the results.

CREATE FUNCTION spectrum._create_experiments()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.metrics') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.metrics (
        metric text NOT NULL CONSTRAINT metrics_pkey PRIMARY KEY,
        kind text NOT NULL
            CONSTRAINT metrics_kind_is_known CHECK (kind IN ('proportion', 'mean', 'ratio')),
        event_type text NOT NULL,
        property text,
        properties_filter jsonb,
        time_window interval,
        denominator_event_type text
            CONSTRAINT metrics_ratio_has_denominator
            CHECK ((kind = 'ratio') = (denominator_event_type IS NOT NULL)),
        denominator_property text,
        denominator_filter jsonb,
        is_guardrail boolean NOT NULL DEFAULT false,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.metrics IS
        'What experiments measure, one row a metric. Define one with spectrum.define_metric().';
    COMMENT ON COLUMN spectrum.metrics.metric IS 'Name.';
    COMMENT ON COLUMN spectrum.metrics.kind IS
        'proportion: share of users with the event; mean: sum per user; ratio: sum over all users '
        '/ sum of the denominator over all users.';
    COMMENT ON COLUMN spectrum.metrics.event_type IS 'Event that counts.';
    COMMENT ON COLUMN spectrum.metrics.property IS
        'Property whose number is summed; NULL counts the events.';
    COMMENT ON COLUMN spectrum.metrics.properties_filter IS
        'Only events whose properties contain this.';
    COMMENT ON COLUMN spectrum.metrics.time_window IS
        'How long after the first exposure events count; NULL: to the end of the experiment.';
    COMMENT ON COLUMN spectrum.metrics.denominator_event_type IS 'Of a ratio: its lower event.';
    COMMENT ON COLUMN spectrum.metrics.denominator_property IS
        'Of a ratio: the property summed below; NULL counts the events.';
    COMMENT ON COLUMN spectrum.metrics.denominator_filter IS
        'Of a ratio: only lower events whose properties contain this.';
    COMMENT ON COLUMN spectrum.metrics.is_guardrail IS
        'Watched, but not part of the family that p-values are adjusted over.';
    COMMENT ON COLUMN spectrum.metrics.changed_at IS 'When it was last defined.';

    CREATE TABLE spectrum.experiments (
        experiment text NOT NULL CONSTRAINT experiments_pkey PRIMARY KEY,
        variants jsonb NOT NULL,
        control text NOT NULL,
        metrics text[] NOT NULL,
        starts_at timestamptz,
        ends_at timestamptz,
        confidence double precision NOT NULL
            CONSTRAINT experiments_confidence_range CHECK (confidence > 0 AND confidence < 1),
        correction text NOT NULL
            CONSTRAINT experiments_correction_is_known
            CHECK (correction IN ('holm', 'benjamini_hochberg')),
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        winsorize double precision
            CONSTRAINT experiments_winsorize_range CHECK (winsorize > 0.5 AND winsorize < 1),
        cuped interval
            CONSTRAINT experiments_cuped_is_positive CHECK (cuped > interval '0'),
        sequential bigint
            CONSTRAINT experiments_sequential_is_positive CHECK (sequential > 0),
        CONSTRAINT experiments_control_is_variant CHECK (variants ? control)
    );
    COMMENT ON TABLE spectrum.experiments IS
        'The experiments, one row each. Define one with spectrum.define_experiment().';
    COMMENT ON COLUMN spectrum.experiments.experiment IS 'Name, as the exposure events give it.';
    COMMENT ON COLUMN spectrum.experiments.variants IS 'Planned split: weight of each variant.';
    COMMENT ON COLUMN spectrum.experiments.control IS 'Variant that the others are compared with.';
    COMMENT ON COLUMN spectrum.experiments.metrics IS 'Metrics it is judged by, in this order.';
    COMMENT ON COLUMN spectrum.experiments.starts_at IS 'Exposures before this do not count.';
    COMMENT ON COLUMN spectrum.experiments.ends_at IS
        'Exposures from here on do not count, nor do events of metrics without a window.';
    COMMENT ON COLUMN spectrum.experiments.confidence IS 'Of all intervals.';
    COMMENT ON COLUMN spectrum.experiments.correction IS
        'How p-values are adjusted for several metrics and variants.';
    COMMENT ON COLUMN spectrum.experiments.changed_at IS 'When it was last defined.';
    COMMENT ON COLUMN spectrum.experiments.winsorize IS
        'Percentile at which the units'' amounts are cut; NULL: they are not.';
    COMMENT ON COLUMN spectrum.experiments.cuped IS
        'How long before the first exposure the covariate is measured; NULL: no CUPED.';
    COMMENT ON COLUMN spectrum.experiments.sequential IS
        'Units at which always-valid intervals are narrowest; NULL: intervals for one look.';

    PERFORM spectrum._create_experiment_views();
END
$$;
COMMENT ON FUNCTION spectrum._create_experiments() IS
    'Room 71: makes the definition tables of experiments, then the views.';

CREATE FUNCTION spectrum.define_metric(
    p_name text,
    p_kind text,
    p_event text,
    p_property text DEFAULT NULL,
    p_window interval DEFAULT NULL,
    p_where jsonb DEFAULT NULL,
    p_denominator_event text DEFAULT NULL,
    p_denominator_property text DEFAULT NULL,
    p_denominator_where jsonb DEFAULT NULL,
    p_guardrail boolean DEFAULT false
)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM spectrum._check_choice('p_kind', p_kind, '{proportion, mean, ratio}');
    IF p_event IS NULL OR p_event = '' THEN
        PERFORM spectrum._reject('p_event', p_event, 'an event type');
    END IF;
    IF p_kind = 'proportion' AND p_property IS NOT NULL THEN
        PERFORM spectrum._reject(
            'p_property', p_property, 'NULL: a proportion counts the users with the event'
        );
    END IF;
    IF p_window NOT BETWEEN interval '1 us' AND interval '10 years' THEN
        PERFORM spectrum._reject(
            'p_window', p_window::text, 'an interval above 0, of at most 10 years, or NULL'
        );
    END IF;
    PERFORM analytics._check_filter('p_where', p_where);
    PERFORM analytics._check_filter('p_denominator_where', p_denominator_where);
    IF p_kind = 'ratio' AND coalesce(p_denominator_event, '') = '' THEN
        PERFORM spectrum._reject(
            'p_denominator_event', p_denominator_event, 'an event type: a ratio has two'
        );
    ELSIF p_kind <> 'ratio' AND num_nonnulls(
        p_denominator_event, p_denominator_property, p_denominator_where
    ) > 0 THEN
        PERFORM spectrum._reject('p_kind', p_kind, 'ratio, since a denominator is given');
    END IF;
    IF p_guardrail IS NULL THEN
        PERFORM spectrum._reject('p_guardrail', p_guardrail::text, 'true or false');
    END IF;

    INSERT INTO spectrum.metrics (
        metric, kind, event_type, property, properties_filter, time_window,
        denominator_event_type, denominator_property, denominator_filter, is_guardrail
    )
    VALUES (
        p_name, p_kind, p_event, p_property, p_where, p_window,
        p_denominator_event, p_denominator_property, p_denominator_where, p_guardrail
    )
    ON CONFLICT ON CONSTRAINT metrics_pkey DO UPDATE SET
        kind = excluded.kind,
        event_type = excluded.event_type,
        property = excluded.property,
        properties_filter = excluded.properties_filter,
        time_window = excluded.time_window,
        denominator_event_type = excluded.denominator_event_type,
        denominator_property = excluded.denominator_property,
        denominator_filter = excluded.denominator_filter,
        is_guardrail = excluded.is_guardrail,
        changed_at = excluded.changed_at;
    PERFORM spectrum._begin_report(
        'experiment', experiment, to_jsonb(analytics._experiment_plan(experiment)))
    FROM spectrum.experiments WHERE p_name = ANY (metrics);
END
$$;
COMMENT ON FUNCTION spectrum.define_metric(
    text, text, text, text, interval, jsonb, text, text, jsonb, boolean
) IS
    'Defines a metric or replaces it. p_kind: proportion (share of users with p_event), mean (per '
    'user, the sum of p_property over p_event, or the number of events) or ratio (that sum over '
    'all users / the same of p_denominator_event). p_where: JSON containment. p_window: how long '
    'after the first exposure. p_guardrail: watched, but left out of the adjusted p-values.';

CREATE FUNCTION spectrum.drop_metric(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_users text := (
        SELECT string_agg(experiment, ', ' ORDER BY experiment) FROM spectrum.experiments
        WHERE p_name = ANY (metrics)
    );
BEGIN
    IF v_users IS NOT NULL THEN
        PERFORM spectrum._reject(
            'p_name', p_name, 'a metric that no experiment is judged by; this one is by ' || v_users
        );
    END IF;
    DELETE FROM spectrum.metrics WHERE metric = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a metric in spectrum.metrics');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum.drop_metric(text) IS
    'Forgets a metric; 22023 if there is none of that name or an experiment is judged by it.';

CREATE FUNCTION spectrum._check_variants(p_variants jsonb, p_control text)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_form text := 'a JSON object of two or more variants with their planned weights, each above '
        '0 and at most 1000000, such as {"control": 0.5, "treatment": 0.5}';
    r_variant record;
    v_count integer := 0;
BEGIN
    IF p_variants IS NULL OR jsonb_typeof(p_variants) <> 'object' THEN
        PERFORM spectrum._reject('p_variants', p_variants::text, v_form);
    END IF;
    FOR r_variant IN SELECT v.key, v.value FROM jsonb_each(p_variants) AS v LOOP
        v_count := v_count + 1;
        PERFORM spectrum._check_name('p_variants', r_variant.key);
        IF jsonb_typeof(r_variant.value) <> 'number'
            OR r_variant.value::numeric NOT BETWEEN 0.000001 AND 1000000
        THEN
            PERFORM spectrum._reject('p_variants', p_variants::text, v_form);
        END IF;
    END LOOP;
    IF v_count < 2 THEN
        PERFORM spectrum._reject('p_variants', p_variants::text, v_form);
    END IF;
    PERFORM spectrum._check_choice(
        'p_control', p_control, ARRAY(SELECT k.key FROM jsonb_object_keys(p_variants) AS k (key))
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_variants(jsonb, text) IS
    'Raises 22023 unless the variants are a planned split of which control is one.';

CREATE FUNCTION spectrum._read_metrics(p_metrics jsonb)
RETURNS text[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_form text := 'a JSON array of one or more names in spectrum.metrics, each once';
    v_metrics text[];
    v_unknown text;
BEGIN
    IF p_metrics IS NULL OR jsonb_typeof(p_metrics) <> 'array' OR p_metrics = '[]' THEN
        PERFORM spectrum._reject('p_metrics', p_metrics::text, v_form);
    END IF;
    v_metrics := ARRAY(
        SELECT m.name FROM jsonb_array_elements_text(p_metrics) WITH ORDINALITY AS m (name, number)
        ORDER BY m.number
    );
    IF cardinality(v_metrics) <> (SELECT count(DISTINCT m.name) FROM unnest(v_metrics) AS m (name))
    THEN
        PERFORM spectrum._reject('p_metrics', p_metrics::text, v_form);
    END IF;
    SELECT m.name INTO v_unknown FROM unnest(v_metrics) AS m (name)
    WHERE NOT EXISTS (SELECT FROM spectrum.metrics AS d WHERE d.metric = m.name)
    LIMIT 1;
    IF FOUND THEN
        PERFORM spectrum._reject('p_metrics', v_unknown, v_form);
    END IF;
    RETURN v_metrics;
END
$$;
COMMENT ON FUNCTION spectrum._read_metrics(jsonb) IS
    'The names of a JSON array of metrics; raises 22023 unless all are defined.';

CREATE FUNCTION analytics._check_methods(
    p_winsorize double precision, p_cuped interval, p_sequential bigint
)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT (p_winsorize > 0.5 AND p_winsorize <= 1) THEN
        PERFORM spectrum._reject(
            'p_winsorize', p_winsorize::text,
            'a percentile above 0.5 and below 1, such as 0.99, or 1 not to winsorize'
        );
    END IF;
    IF p_cuped NOT BETWEEN interval '0' AND interval '10 years' THEN
        PERFORM spectrum._reject(
            'p_cuped', p_cuped::text, 'an interval of at most 10 years, or 0 for no CUPED'
        );
    END IF;
    IF p_sequential NOT BETWEEN 0 AND 1000000000000 THEN
        PERFORM spectrum._reject(
            'p_sequential', p_sequential::text,
            'the number of units at which intervals are narrowest, such as 5000, or 0 for '
            'intervals that hold for one look'
        );
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._check_methods(double precision, interval, bigint) IS
    'Raises 22023 unless the optional methods of an experiment can be applied.';

CREATE FUNCTION spectrum.define_experiment(
    p_name text,
    p_variants jsonb,
    p_control text,
    p_metrics jsonb,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_confidence double precision DEFAULT 0.95,
    p_correction text DEFAULT 'holm',
    p_winsorize double precision DEFAULT NULL,
    p_cuped interval DEFAULT NULL,
    p_sequential bigint DEFAULT NULL
)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_metrics text[];
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM spectrum._check_variants(p_variants, p_control);
    v_metrics := spectrum._read_metrics(p_metrics);
    PERFORM analytics._check_range(p_from, p_to);
    PERFORM analytics._check_confidence(p_confidence);
    PERFORM spectrum._check_choice('p_correction', p_correction, '{holm, benjamini_hochberg}');
    PERFORM analytics._check_methods(p_winsorize, p_cuped, p_sequential);

    INSERT INTO spectrum.experiments (
        experiment, variants, control, metrics, starts_at, ends_at, confidence, correction,
        winsorize, cuped, sequential
    )
    VALUES (
        p_name, p_variants, p_control, v_metrics, p_from, p_to, p_confidence, p_correction,
        nullif(p_winsorize, 1), nullif(p_cuped, '0'), nullif(p_sequential, 0)
    )
    ON CONFLICT ON CONSTRAINT experiments_pkey DO UPDATE SET
        variants = excluded.variants,
        control = excluded.control,
        metrics = excluded.metrics,
        starts_at = excluded.starts_at,
        ends_at = excluded.ends_at,
        confidence = excluded.confidence,
        correction = excluded.correction,
        winsorize = excluded.winsorize,
        cuped = excluded.cuped,
        sequential = excluded.sequential,
        changed_at = excluded.changed_at;
    PERFORM spectrum._begin_report(
        'experiment', p_name, to_jsonb(analytics._experiment_plan(p_name)));
END
$$;
COMMENT ON FUNCTION spectrum.define_experiment(
    text, jsonb, text, jsonb, timestamptz, timestamptz, double precision, text, double precision,
    interval, bigint
) IS
    'Defines an experiment or replaces it. p_name: as its exposure events give it. p_variants: the '
    'planned split, {"control": 0.5, "treatment": 0.5}. p_metrics: names of metrics, ["signup"]. '
    'p_from, p_to: when exposures count (NULL: always). p_correction: holm or benjamini_hochberg. '
    'p_winsorize: percentile to cut amounts at; p_cuped: how long before the exposure the metric '
    'is its own covariate; p_sequential: units at which always-valid intervals are narrowest.';

CREATE FUNCTION spectrum.drop_experiment(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM spectrum.experiments WHERE experiment = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'an experiment in spectrum.experiments');
    END IF;
    PERFORM spectrum._discard_reports('experiment', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_experiment(text) IS
    'Forgets an experiment, not its events; 22023 if there is none of that name.';
