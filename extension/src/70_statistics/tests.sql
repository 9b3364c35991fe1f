-- Room 70, tests: intervals, tests and corrections for two groups, from counts and moments alone.
-- No data; read by the experiments and by anyone.
--
-- Whatever compares two groups gives the first minus (or over) the second, as SciPy does: the
-- treatment comes first, the control second. Counts are double precision, so that bigint and
-- numeric are taken as they are. An empty group, or no variance at all, gives NULL where there is
-- no answer, never an error; NULL gives NULL; an impossible argument raises 22023.

CREATE FUNCTION spectrum._check_count(p_argument text, p_value double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(
        p_argument, p_value, p_value >= 0 AND p_value < 'Infinity', 'a count, 0 or more'
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_count(text, double precision) IS
    'Raises 22023 unless the number can be a count; NaN and NULL pass.';

CREATE FUNCTION spectrum._check_variance(p_argument text, p_value double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(p_argument, p_value, p_value >= 0, 'a variance, 0 or more');
END
$$;
COMMENT ON FUNCTION spectrum._check_variance(text, double precision) IS
    'Raises 22023 unless the number can be a variance; NaN and NULL pass.';

CREATE FUNCTION spectrum._outer_tail(p_confidence double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(
        'p_confidence', p_confidence, p_confidence > 0 AND p_confidence < 1,
        'a number between 0 and 1, such as 0.95'
    );
    RETURN (1 - p_confidence) / 2;
END
$$;
COMMENT ON FUNCTION spectrum._outer_tail(double precision) IS
    'The probability that an equal-tail interval leaves out on each side.';

CREATE FUNCTION spectrum.wilson_interval(
    p_successes double precision,
    p_n double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_z double precision := -spectrum.normal_quantile(spectrum._outer_tail(p_confidence));
    v_root double precision;
BEGIN
    PERFORM spectrum._check_count('p_n', p_n);
    PERFORM spectrum._check_number(
        'p_successes', p_successes, p_successes BETWEEN 0 AND p_n,
        format('a count from 0 to p_n (%s)', p_n)
    );
    IF p_n = 0 THEN
        RETURN;
    END IF;
    -- the lower root by the product of both: no cancellation
    v_root := v_z * sqrt(p_successes * ((p_n - p_successes) / p_n) + v_z * v_z / 4);
    low := CASE
        WHEN p_successes = 0 THEN 0
        ELSE p_successes * (p_successes / p_n) / (p_successes + v_z * v_z / 2 + v_root)
    END;
    high := CASE
        WHEN p_successes = p_n THEN 1
        ELSE (p_successes + v_z * v_z / 2 + v_root) / (p_n + v_z * v_z)
    END;
END
$$;
COMMENT ON FUNCTION spectrum.wilson_interval(
    double precision, double precision, double precision
) IS
    'Score interval of a proportion (Wilson 1927): all p with '
    '|successes / n - p| <= z sqrt(p (1 - p) / n), z the normal quantile of equal tails; no '
    'continuity correction. NULL for n = 0.';

CREATE FUNCTION spectrum.two_proportion_test(
    p_x1 double precision,
    p_n1 double precision,
    p_x2 double precision,
    p_n2 double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT z double precision,
    OUT p_value double precision,
    OUT difference double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_n double precision;
    v_error double precision;
    r_first record;
    r_second record;
BEGIN
    PERFORM spectrum._outer_tail(p_confidence);
    PERFORM spectrum._check_count('p_n1', p_n1);
    PERFORM spectrum._check_count('p_n2', p_n2);
    PERFORM spectrum._check_number(
        'p_x1', p_x1, p_x1 BETWEEN 0 AND p_n1, format('a count from 0 to p_n1 (%s)', p_n1)
    );
    PERFORM spectrum._check_number(
        'p_x2', p_x2, p_x2 BETWEEN 0 AND p_n2, format('a count from 0 to p_n2 (%s)', p_n2)
    );
    IF p_n1 = 0 OR p_n2 = 0 THEN
        RETURN;
    END IF;

    difference := p_x1 / p_n1 - p_x2 / p_n2;
    v_n := p_n1 + p_n2;
    v_error := sqrt(
        (p_x1 + p_x2) / v_n * ((p_n1 - p_x1 + p_n2 - p_x2) / v_n) * (1 / p_n1 + 1 / p_n2)
    );
    z := difference / nullif(v_error, 0);
    p_value := 2 * spectrum.normal_sf(abs(z));

    SELECT w.low, w.high INTO r_first
    FROM spectrum.wilson_interval(p_x1, p_n1, p_confidence) AS w;
    SELECT w.low, w.high INTO r_second
    FROM spectrum.wilson_interval(p_x2, p_n2, p_confidence) AS w;
    low := difference - sqrt((p_x1 / p_n1 - r_first.low) ^ 2 + (r_second.high - p_x2 / p_n2) ^ 2);
    high := difference + sqrt((r_first.high - p_x1 / p_n1) ^ 2 + (p_x2 / p_n2 - r_second.low) ^ 2);
END
$$;
COMMENT ON FUNCTION spectrum.two_proportion_test(
    double precision, double precision, double precision, double precision, double precision
) IS
    'Two-sided z-test of x1 / n1 = x2 / n2 with the pooled proportion in the standard error, no '
    'continuity correction; difference = x1 / n1 - x2 / n2 with the hybrid score interval of '
    'Newcombe (1998, Statistics in Medicine 17, 873, method 10). All NULL where a group is empty; '
    'z and p_value NULL where all or none succeeded.';

CREATE FUNCTION spectrum.welch_t_test(
    p_n1 double precision,
    p_mean1 double precision,
    p_var1 double precision,
    p_n2 double precision,
    p_mean2 double precision,
    p_var2 double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT t double precision,
    OUT df double precision,
    OUT p_value double precision,
    OUT difference double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_tail double precision := spectrum._outer_tail(p_confidence);
    v_square1 double precision;
    v_square2 double precision;
    v_error double precision;
    v_margin double precision;
BEGIN
    PERFORM spectrum._check_count('p_n1', p_n1);
    PERFORM spectrum._check_count('p_n2', p_n2);
    PERFORM spectrum._check_variance('p_var1', p_var1);
    PERFORM spectrum._check_variance('p_var2', p_var2);
    IF p_n1 = 0 OR p_n2 = 0 THEN
        RETURN;
    END IF;

    difference := p_mean1 - p_mean2;
    v_square1 := p_var1 / p_n1;
    v_square2 := p_var2 / p_n2;
    IF p_n1 <= 1 OR p_n2 <= 1 OR v_square1 + v_square2 = 0 THEN
        RETURN;
    END IF;
    v_error := sqrt(v_square1 + v_square2);
    t := difference / v_error;
    -- by shares of the squared error, which cannot leave the range of a float8
    df := 1 / (
        greatest(v_square1 / (v_square1 + v_square2), 1e-100) ^ 2 / (p_n1 - 1)
        + greatest(v_square2 / (v_square1 + v_square2), 1e-100) ^ 2 / (p_n2 - 1)
    );
    p_value := 2 * spectrum.student_t_sf(abs(t), df);
    v_margin := -v_error * spectrum.student_t_quantile(v_tail, df);
    low := difference - v_margin;
    high := difference + v_margin;
END
$$;
COMMENT ON FUNCTION spectrum.welch_t_test(
    double precision, double precision, double precision,
    double precision, double precision, double precision, double precision
) IS
    'Two-sided t-test of equal means without equal variances (Welch 1947), from the size, mean and '
    'sample variance (var_samp) of two groups; degrees of freedom by Welch and Satterthwaite; '
    'difference = mean1 - mean2 with its t interval. All NULL where a group is empty; all but the '
    'difference NULL where a group has one member or neither has any variance.';

CREATE FUNCTION spectrum._lift_error(
    p_n1 double precision,
    p_mean1 double precision,
    p_var1 double precision,
    p_n2 double precision,
    p_mean2 double precision,
    p_var2 double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN nullif(
        sqrt(p_var1 / p_n1 + (p_mean1 / p_mean2) ^ 2 * (p_var2 / p_n2)) / abs(p_mean2), 0
    );
END
$$;
COMMENT ON FUNCTION spectrum._lift_error(
    double precision, double precision, double precision,
    double precision, double precision, double precision
) IS
    'Standard error of mean1 / mean2 - 1 by the delta method; NULL without any variance.';

CREATE FUNCTION spectrum.lift_interval(
    p_n1 double precision,
    p_mean1 double precision,
    p_var1 double precision,
    p_n2 double precision,
    p_mean2 double precision,
    p_var2 double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT lift double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_z double precision := -spectrum.normal_quantile(spectrum._outer_tail(p_confidence));
    v_error double precision;
BEGIN
    PERFORM spectrum._check_count('p_n1', p_n1);
    PERFORM spectrum._check_count('p_n2', p_n2);
    PERFORM spectrum._check_variance('p_var1', p_var1);
    PERFORM spectrum._check_variance('p_var2', p_var2);
    IF p_n1 = 0 OR p_n2 = 0 OR p_mean2 = 0 THEN
        RETURN;
    END IF;

    lift := (p_mean1 - p_mean2) / p_mean2;
    v_error := spectrum._lift_error(p_n1, p_mean1, p_var1, p_n2, p_mean2, p_var2);
    low := lift - v_z * v_error;
    high := lift + v_z * v_error;
END
$$;
COMMENT ON FUNCTION spectrum.lift_interval(
    double precision, double precision, double precision,
    double precision, double precision, double precision, double precision
) IS
    'Relative lift mean1 / mean2 - 1 of independent groups with its delta-method interval: '
    'variance = (var1 / n1 + (mean1 / mean2)^2 var2 / n2) / mean2^2 (Deng, Knoblich and Lu 2018, '
    'Applying the delta method in metric analytics), normal quantile. For proportions the mean is '
    'p and the variance p (1 - p). All NULL where a group is empty or mean2 is 0; bounds NULL '
    'without any variance.';

CREATE FUNCTION spectrum.ratio_variance(
    p_n double precision,
    p_mean_x double precision,
    p_var_x double precision,
    p_mean_y double precision,
    p_var_y double precision,
    p_cov_xy double precision,
    OUT ratio double precision,
    OUT variance double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_count('p_n', p_n);
    PERFORM spectrum._check_variance('p_var_x', p_var_x);
    PERFORM spectrum._check_variance('p_var_y', p_var_y);
    IF p_n = 0 OR p_mean_y = 0 THEN
        RETURN;
    END IF;
    ratio := p_mean_x / p_mean_y;
    variance := greatest(0, p_var_x - 2 * ratio * p_cov_xy + ratio * ratio * p_var_y)
        / p_mean_y / p_mean_y / p_n;
END
$$;
COMMENT ON FUNCTION spectrum.ratio_variance(
    double precision, double precision, double precision,
    double precision, double precision, double precision
) IS
    'Ratio R = mean_x / mean_y of two sums over the same n units and, by the delta method, the '
    'variance of R: (var_x - 2 R cov_xy + R^2 var_y) / (n mean_y^2) (Deng, Knoblich and Lu 2018). '
    'n * variance is the variance per unit that welch_t_test and lift_interval take beside n and '
    'R. NULL for n = 0 or mean_y = 0.';

CREATE FUNCTION spectrum.sample_ratio_mismatch(
    p_counts bigint[],
    p_weights double precision[],
    OUT chi_square double precision,
    OUT df integer,
    OUT p_value double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_per_weight double precision;
BEGIN
    IF cardinality(p_counts) < 2 THEN
        PERFORM spectrum._reject('p_counts', p_counts::text, 'two or more counts');
    ELSIF 0 > ANY (p_counts) THEN
        PERFORM spectrum._reject('p_counts', p_counts::text, 'counts, each 0 or more');
    ELSIF cardinality(p_weights) <> cardinality(p_counts) THEN
        PERFORM spectrum._reject('p_weights', p_weights::text, 'one weight for each count');
    ELSIF 0 >= ANY (p_weights) OR 'Infinity' = ANY (p_weights) THEN
        PERFORM spectrum._reject('p_weights', p_weights::text, 'positive finite weights');
    END IF;
    SELECT sum(c.count) / nullif(sum(c.weight), 0) INTO v_per_weight
    FROM unnest(p_counts, p_weights) AS c (count, weight)
    HAVING count(c.count) = count(*) AND count(c.weight) = count(*) AND sum(c.count) > 0;
    IF v_per_weight IS NULL THEN
        RETURN;
    END IF;

    SELECT sum((c.count - v_per_weight * c.weight) ^ 2 / (v_per_weight * c.weight))
    INTO chi_square
    FROM unnest(p_counts, p_weights) AS c (count, weight);
    df := cardinality(p_counts) - 1;
    p_value := spectrum.chi_square_sf(chi_square, df);
END
$$;
COMMENT ON FUNCTION spectrum.sample_ratio_mismatch(bigint[], double precision[]) IS
    'Pearson''s chi-square test (1900) that counts follow the planned split, given by weights of '
    'any sum. A p-value below 0.001 says that the assignment or the logging is broken. NULL where '
    'nothing was counted or an element is NULL.';

CREATE FUNCTION spectrum.adjust_p_values(
    p_values double precision[], p_method text DEFAULT 'holm'
)
RETURNS double precision[]
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_choice('p_method', p_method, ARRAY['holm', 'benjamini_hochberg']);
    PERFORM spectrum._check_probability('p_values', v.p) FROM unnest(p_values) AS v (p);
    RETURN coalesce((
        WITH ranked_values AS (
            SELECT v.place, v.p, count(nullif(v.p, 'NaN')) OVER () AS family,
                row_number() OVER (ORDER BY nullif(v.p, 'NaN')) AS rank
            FROM unnest(p_values) WITH ORDINALITY AS v (p, place)
        ),
        adjusted_values AS (
            SELECT place, p, CASE p_method
                WHEN 'holm' THEN max(p * (family - rank + 1)) OVER (ORDER BY rank)
                ELSE min(p * family / rank) OVER (ORDER BY rank DESC)
            END AS adjusted
            FROM ranked_values
        )
        SELECT array_agg(
            CASE WHEN p IS NULL OR p = 'NaN' THEN p ELSE least(adjusted, 1) END ORDER BY place
        )
        FROM adjusted_values
    ), '{}');
END
$$;
COMMENT ON FUNCTION spectrum.adjust_p_values(double precision[], text) IS
    'p-values corrected for their number, in the order given. holm: step-down, controls the '
    'probability of any false discovery (Holm 1979). benjamini_hochberg: step-up, controls the '
    'expected share of false discoveries (Benjamini and Hochberg 1995). NULL and NaN stay as they '
    'are and are not counted.';
