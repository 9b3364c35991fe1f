-- Room 71, the plan: an experiment as it is asked about, made from its definition and from what the
-- question says otherwise; and the totals, all that its answer is made of. Everything behind
-- analytics.experiment takes a plan; the answer takes the plan and the totals alone.

CREATE TYPE analytics._experiment_plan AS (
    experiment text,
    variants jsonb,
    control text,
    metrics text[],
    starts_at timestamptz,
    ends_at timestamptz,
    confidence double precision,
    correction text,
    winsorize double precision,
    cuped interval,
    sequential bigint,
    measures jsonb
);
COMMENT ON TYPE analytics._experiment_plan IS
    'An experiment as it is asked about: the columns of analytics.experiments, and its metrics as '
    'they were when it was: rows of analytics.metrics.';

CREATE TYPE analytics._experiment_total AS (
    account_id text,
    metric text,
    variant text,
    units bigint,
    excluded_units bigint,
    conversions bigint,
    sum_x numeric,
    sum_xx numeric,
    sum_y numeric,
    sum_yy numeric,
    sum_xy numeric,
    sum_w numeric,
    sum_ww numeric,
    sum_v numeric,
    sum_vv numeric,
    sum_wv numeric,
    sum_xw numeric,
    sum_xv numeric,
    sum_yw numeric,
    sum_yv numeric,
    winsor_low numeric,
    winsor_high numeric
);
COMMENT ON TYPE analytics._experiment_total IS
    'A metric in one variant and scope: units, and sums over them of what each did since the first '
    'exposure (x over y) and before it (w over v), and of products of two. y and v are 1 but for a '
    'ratio, so that every metric is one. Bounds that x was cut at.';

CREATE FUNCTION analytics._experiment_plan(
    p_experiment text,
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_confidence double precision DEFAULT NULL,
    p_correction text DEFAULT NULL,
    p_winsorize double precision DEFAULT NULL,
    p_cuped interval DEFAULT NULL,
    p_sequential bigint DEFAULT NULL
)
RETURNS analytics._experiment_plan
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_plan analytics._experiment_plan;
BEGIN
    SELECT e.experiment, e.variants, e.control, e.metrics,
        coalesce(p_from, e.starts_at), coalesce(p_to, e.ends_at),
        coalesce(p_confidence, e.confidence), coalesce(p_correction, e.correction),
        nullif(coalesce(p_winsorize, e.winsorize), 1),
        nullif(coalesce(p_cuped, e.cuped), '0'),
        nullif(coalesce(p_sequential, e.sequential), 0),
        (SELECT jsonb_agg(to_jsonb(m) - 'changed_at' ORDER BY m.metric)
        FROM analytics.metrics AS m WHERE m.metric = ANY (e.metrics))
    INTO v_plan
    FROM analytics.experiments AS e
    WHERE e.experiment = p_experiment;
    RETURN v_plan;
END
$$;
COMMENT ON FUNCTION analytics._experiment_plan(
    text, timestamptz, timestamptz, double precision, text, double precision, interval, bigint
) IS
    'The plan of an experiment: what is NULL is as defined, 1 or 0 switches a method off.';

CREATE FUNCTION analytics._measures(p_measures jsonb)
RETURNS TABLE (
    metric text,
    kind text,
    event_type text,
    property text,
    properties_filter jsonb,
    time_window interval,
    denominator_event_type text,
    denominator_property text,
    denominator_filter jsonb,
    is_guardrail boolean
)
LANGUAGE sql IMMUTABLE PARALLEL SAFE ROWS 3
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT * FROM jsonb_to_recordset(p_measures) AS m (
        metric text, kind text, event_type text, property text, properties_filter jsonb,
        time_window interval, denominator_event_type text, denominator_property text,
        denominator_filter jsonb, is_guardrail boolean
    )
$$;
COMMENT ON FUNCTION analytics._measures(jsonb) IS
    'The metrics of a plan, as rows of analytics.metrics.';
