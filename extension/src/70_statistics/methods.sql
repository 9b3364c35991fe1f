-- Room 70, methods: what may be asked beside a plain test. An interval that may be looked at as
-- often as one likes, the chance that the better-looking one is better, and where long tails are
-- cut. No data; read by the experiments and by anyone.

CREATE FUNCTION spectrum.sequential_test(
    p_n double precision,
    p_estimate double precision,
    p_error double precision,
    p_tuning double precision DEFAULT 5000,
    p_confidence double precision DEFAULT 0.95,
    OUT p_value double precision,
    OUT low double precision,
    OUT high double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_bar double precision := -2 * ln(2 * spectrum._outer_tail(p_confidence));
    v_mixture double precision;
    v_margin double precision;
    v_log_p double precision;
BEGIN
    PERFORM spectrum._check_count('p_n', p_n);
    PERFORM spectrum._check_number('p_error', p_error, p_error >= 0, 'a standard error, 0 or more');
    PERFORM spectrum._check_positive('p_tuning', p_tuning);
    IF p_n = 0 OR p_error = 0 THEN
        RETURN;
    END IF;
    -- n rho^2, with the rho that makes the interval narrowest at n = p_tuning
    v_mixture := p_n / p_tuning * (v_bar + ln(v_bar + 1));
    v_margin := p_error * sqrt((1 + 1 / v_mixture) * (ln(v_mixture + 1) + v_bar));
    low := p_estimate - v_margin;
    high := p_estimate + v_margin;
    v_log_p := (
        ln(v_mixture + 1) - (p_estimate / p_error) ^ 2 * (v_mixture / (v_mixture + 1))
    ) / 2;
    p_value := CASE
        WHEN v_log_p BETWEEN 0 AND 1e300 THEN 1
        ELSE spectrum._exponential(v_log_p)
    END;
END
$$;
COMMENT ON FUNCTION spectrum.sequential_test(
    double precision, double precision, double precision, double precision, double precision
) IS
    'Always-valid interval and two-sided p-value of an estimate from n observations with this '
    'standard error: they hold at every look at once, so one may stop at any. The asymptotic '
    'confidence sequence of Waudby-Smith et al. (2024, Annals of Statistics 52, 2613), which is '
    'the mixture SPRT with a normal mixture (Robbins 1970; Johari et al. 2017). p_tuning: the n at '
    'which it is narrowest. NULL without observations or error.';

CREATE FUNCTION spectrum.normal_posterior(
    p_difference double precision,
    p_error double precision,
    p_confidence double precision DEFAULT 0.95,
    OUT chance_to_win double precision,
    OUT low double precision,
    OUT high double precision,
    OUT expected_loss double precision
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_z double precision;
    v_margin double precision := -p_error
        * spectrum.normal_quantile(spectrum._outer_tail(p_confidence));
BEGIN
    PERFORM spectrum._check_number('p_error', p_error, p_error >= 0, 'a standard error, 0 or more');
    IF p_error = 0 THEN
        RETURN;
    END IF;
    v_z := p_difference / p_error;
    chance_to_win := spectrum.normal_cdf(v_z);
    low := p_difference - v_margin;
    high := p_difference + v_margin;
    expected_loss := p_error * greatest(
        0, spectrum._exponential(-v_z * v_z / 2) / sqrt(2 * pi()) - v_z * spectrum.normal_sf(v_z)
    );
END
$$;
COMMENT ON FUNCTION spectrum.normal_posterior(
    double precision, double precision, double precision
) IS
    'What a flat prior and a normal likelihood say of a difference: its posterior is normal around '
    'p_difference with deviation p_error. chance_to_win: that it is above 0; low, high: credible '
    'interval of equal tails; expected_loss: mean of what is lost by choosing it, 0 where it is '
    'above 0. NULL without error.';

CREATE FUNCTION spectrum._quantile(
    p_sorted numeric[], p_below bigint, p_zeros bigint, p_share numeric
)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_place numeric := (cardinality(p_sorted) + p_zeros - 1) * p_share;
    v_ends numeric[] := ARRAY(
        SELECT CASE
            WHEN r.rank < p_below THEN p_sorted[r.rank + 1]
            WHEN r.rank < p_below + p_zeros THEN 0
            ELSE p_sorted[r.rank - p_zeros + 1]
        END
        FROM unnest(ARRAY[floor(v_place), ceil(v_place)]::integer[]) AS r (rank)
    );
BEGIN
    RETURN v_ends[1] + (v_ends[2] - v_ends[1]) * (v_place - floor(v_place));
END
$$;
COMMENT ON FUNCTION spectrum._quantile(numeric[], bigint, bigint, numeric) IS
    'Quantile, linear between two neighbours, of sorted amounts (p_below of them negative, none 0) '
    'with so many zeros in their midst.';

CREATE FUNCTION spectrum.winsor_bounds(
    p_amounts numeric[],
    p_percentile double precision DEFAULT 0.99,
    p_zeros bigint DEFAULT 0,
    OUT low numeric,
    OUT high numeric
)
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_sorted numeric[] := ARRAY(
        SELECT a.amount FROM unnest(p_amounts) AS a (amount) WHERE a.amount <> 0 ORDER BY a.amount
    );
    v_below bigint;
    v_zeros bigint;
BEGIN
    PERFORM spectrum._check_number(
        'p_percentile', p_percentile, p_percentile > 0.5 AND p_percentile <= 1,
        'a number above 0.5 and at most 1, such as 0.99'
    );
    PERFORM spectrum._check_count('p_zeros', p_zeros);
    SELECT count(*) FILTER (WHERE a.amount < 0), p_zeros + count(*) FILTER (WHERE a.amount = 0)
    INTO v_below, v_zeros FROM unnest(p_amounts) AS a (amount);
    IF cardinality(v_sorted) + v_zeros = 0 THEN
        RETURN;
    END IF;
    low := trim_scale(
        least(0, spectrum._quantile(v_sorted, v_below, v_zeros, 1 - p_percentile::numeric))
    );
    high := trim_scale(
        greatest(0, spectrum._quantile(v_sorted, v_below, v_zeros, p_percentile::numeric))
    );
END
$$;
COMMENT ON FUNCTION spectrum.winsor_bounds(numeric[], double precision, bigint) IS
    'Where winsorizing cuts: amounts above high become high, those below low become low. high is '
    'the percentile, linear between neighbours as in percentile_cont, low the one as far from the '
    'other end; but high is at least 0 and low at most 0, so that amounts of one sign are cut at '
    'their far end only. p_zeros: so many more amounts that are 0. NULL amounts are none.';
