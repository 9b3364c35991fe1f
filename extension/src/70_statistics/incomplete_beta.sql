-- Room 70, incomplete beta: the one function behind every distribution, in logarithms. No data;
-- read by distributions.sql alone.
--
-- A point x of (0, 1) is given by the logarithm of its odds, w = ln(x / y) with y = 1 - x, and by
-- its excess over the mean, d = b x - a y = (a + b) x - a. The excess follows from w, but the
-- caller knows it without the rounding error that decides the tails of large shapes. Over w every
-- beta density is log-concave with its peak at the mean x = a / (a + b). No formula takes the
-- difference of nearly equal numbers, and none can leave the range of a float8.

CREATE FUNCTION spectrum._check_number(
    p_argument text, p_value double precision, p_is_possible boolean, p_expected text
)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT p_is_possible AND p_value <> 'NaN' THEN
        PERFORM spectrum._reject(p_argument, p_value::text, p_expected);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_number(text, double precision, boolean, text) IS
    'Raises 22023 unless the number is possible; NaN and NULL pass.';

CREATE FUNCTION spectrum._check_positive(p_argument text, p_value double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(
        p_argument, p_value, p_value > 0 AND p_value < 'Infinity', 'a positive finite number'
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_positive(text, double precision) IS
    'Raises 22023 unless the number is positive and finite; NaN and NULL pass.';

CREATE FUNCTION spectrum._check_probability(p_argument text, p_value double precision)
RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_number(
        p_argument, p_value, p_value BETWEEN 0 AND 1, 'a probability, from 0 to 1'
    );
END
$$;
COMMENT ON FUNCTION spectrum._check_probability(text, double precision) IS
    'Raises 22023 unless the number is a probability; NaN and NULL pass.';

CREATE FUNCTION spectrum._exponential(p_x double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN CASE
        WHEN p_x < -707 THEN 0
        WHEN p_x > 709.78 AND p_x <> 'NaN' THEN 'Infinity'
        ELSE exp(p_x)
    END;
END
$$;
COMMENT ON FUNCTION spectrum._exponential(double precision) IS
    'exp(x), with 0 and Infinity where exp raises underflow and overflow.';

CREATE FUNCTION spectrum._log_one_plus(p_x double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN asinh((p_x + p_x / (1 + p_x)) / 2);
END
$$;
COMMENT ON FUNCTION spectrum._log_one_plus(double precision) IS
    'ln(1 + x) for x > -1, exact for small x too: sinh of it is (1 + x - 1 / (1 + x)) / 2.';

CREATE FUNCTION spectrum._stirling_error(p_a double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := p_a;
    v_steps double precision := 0;
    v_inverse double precision;
    v_square double precision;
BEGIN
    IF p_a > 1e8 THEN
        RETURN 1 / p_a / 12;
    END IF;
    WHILE v_a < 10 LOOP
        v_steps := v_steps + (v_a + 0.5) * (ln(v_a + 1) - ln(v_a)) - 1;
        v_a := v_a + 1;
    END LOOP;
    v_inverse := 1 / v_a;
    v_square := v_inverse * v_inverse;
    RETURN v_steps + v_inverse * (1.0 / 12 - v_square * (1.0 / 360 - v_square * (
        1.0 / 1260 - v_square * (1.0 / 1680 - v_square * (1.0 / 1188 - v_square * (
            691.0 / 360360 - v_square / 156))))));
END
$$;
COMMENT ON FUNCTION spectrum._stirling_error(double precision) IS
    'ln Gamma(a) - ((a - 1/2) ln a - a + ln(2 pi) / 2) for a > 0: what Stirling''s formula leaves. '
    'Its series (DLMF 5.11.1) from a = 10 on, reached by Gamma(a + 1) = a Gamma(a).';

CREATE FUNCTION spectrum._deviance(
    p_a double precision, p_d double precision, p_log_ratio double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_s double precision;
    v_square double precision;
    v_sum double precision := 0;
BEGIN
    IF abs(p_d) < p_a * 1e-60 THEN
        RETURN 0;
    ELSIF p_d < p_a * -0.9 OR p_d > p_a * 10 THEN
        RETURN p_d - p_a * p_log_ratio;
    ELSIF abs(p_d) > p_a * 0.4 THEN
        RETURN p_d - p_a * ln(1 + p_d / p_a);
    END IF;
    -- u - ln(1 + u) = s u - 2 (s^3 / 3 + s^5 / 5 + ...) with s = u / (2 + u)
    v_s := p_d / (2 * p_a + p_d);
    v_square := v_s * v_s;
    FOR v_odd IN REVERSE 25..3 BY 2 LOOP
        v_sum := v_sum * v_square + 1.0 / v_odd;
    END LOOP;
    RETURN p_d * v_s - 2 * p_a * v_square * v_s * v_sum;
END
$$;
COMMENT ON FUNCTION spectrum._deviance(double precision, double precision, double precision) IS
    'd - a ln(1 + d / a), never negative, without cancellation (Loader 2000, Fast and accurate '
    'computation of binomial probabilities, bd0). p_log_ratio is ln(1 + d / a), used far from 0.';

CREATE FUNCTION spectrum._log_beta_density(
    p_log_odds double precision,
    p_excess double precision,
    p_a double precision,
    p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_n double precision := p_a + p_b;
    v_rest double precision := spectrum._log_one_plus(exp(greatest(-abs(p_log_odds), -700)));
    v_log_nx double precision := ln(v_n) + least(p_log_odds, 0) - v_rest;
    v_log_ny double precision := ln(v_n) + least(-p_log_odds, 0) - v_rest;
BEGIN
    RETURN (ln(p_a) + ln(p_b) - ln(v_n) - ln(2 * pi())) / 2
        + spectrum._stirling_error(v_n)
        - spectrum._stirling_error(p_a) - spectrum._stirling_error(p_b)
        - spectrum._deviance(p_a, p_excess, v_log_nx - ln(p_a))
        - spectrum._deviance(p_b, -p_excess, v_log_ny - ln(p_b));
END
$$;
COMMENT ON FUNCTION spectrum._log_beta_density(
    double precision, double precision, double precision, double precision
) IS
    'ln(x^a y^b / B(a, b)): the log density of the log odds of a beta variable. Saddle-point form '
    '(Loader 2000), with no difference of large logarithms of gamma functions.';

CREATE FUNCTION spectrum._log_beta_integral(
    p_log_odds double precision,
    p_excess double precision,
    p_a double precision,
    p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    c_step CONSTANT double precision := 0.125;
    v_odds double precision := exp(greatest(least(p_log_odds, 650), -350));
    v_slope double precision := least(v_odds - p_excess * (1 + v_odds), 1e140);
    v_curvature double precision := greatest(p_b - 1, 0) * v_odds * (1 + v_odds);
    v_scale double precision := least(
        1, 1 / v_odds, 2 / (v_slope + sqrt(v_slope * v_slope + 2 * v_curvature))
    );
    v_s double precision := -3.625;
    v_start double precision;
    v_log_growth double precision;
    v_v double precision;
    v_fall double precision;
    v_rise double precision;
    v_log_rise double precision;
    v_log_value double precision;
    v_sum double precision := 0;
BEGIN
    LOOP
        v_s := v_s + c_step;
        v_start := exp(-least(v_s, 700));
        v_log_growth := v_s - v_start;
        v_v := v_scale * exp(v_log_growth / 2) * exp(v_log_growth / 2);
        v_fall := 2 * tanh(v_v / 2) / (1 + tanh(v_v / 2));
        v_rise := v_odds * v_fall;
        v_log_rise := asinh((v_rise + v_rise / (1 + v_rise)) / 2);
        IF least(p_a, p_b) < 1000 THEN
            v_log_value := (p_b - 1) * v_log_rise - p_a * greatest(v_v, 1e-200);
        ELSE
            v_log_value := -v_slope * v_v - (p_b - 1) * (
                v_odds * spectrum._deviance(1, -v_fall, -v_v)
                + spectrum._deviance(1, v_rise, v_log_rise)
            );
        END IF;
        EXIT WHEN v_log_value + v_log_growth < -50 AND v_s > 0;
        v_sum := v_sum + exp(v_log_value + v_log_growth) * (1 + v_start);
    END LOOP;
    RETURN least(0, ln(v_sum * c_step * v_scale) + ln(1 + v_odds)
        + spectrum._log_beta_density(p_log_odds, p_excess, p_a, p_b));
END
$$;
COMMENT ON FUNCTION spectrum._log_beta_integral(
    double precision, double precision, double precision, double precision
) IS
    'ln I_x(a, b) by quadrature, for x not far above the mean. With t = x e^-v in DLMF 8.17.1, '
    'I_x(a, b) = x^a y^(b - 1) / B(a, b) * integral over v > 0 of e^(-a v) (1 + odds * fall)'
    '^(b - 1), fall = 1 - e^-v: smooth for all a and b, and done to full precision by some 65 '
    'points of the trapezoidal rule after v = scale * exp(s - exp(-s)) (Takahasi and Mori 1974). '
    'For large shapes the logarithms of both factors, which nearly cancel, are taken relative to '
    'their common slope at v = 0.';

CREATE FUNCTION spectrum._log_beta_cdf(
    p_log_odds double precision,
    p_excess double precision,
    p_a double precision,
    p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_log_upper double precision;
BEGIN
    IF p_excess > 0 THEN
        v_log_upper := spectrum._log_beta_integral(-p_log_odds, -p_excess, p_b, p_a);
        IF v_log_upper < ln(0.99) THEN
            RETURN spectrum._log_one_plus(-spectrum._exponential(v_log_upper));
        END IF;
    END IF;
    RETURN spectrum._log_beta_integral(p_log_odds, p_excess, p_a, p_b);
END
$$;
COMMENT ON FUNCTION spectrum._log_beta_cdf(
    double precision, double precision, double precision, double precision
) IS
    'ln I_x(a, b), above the mean by I_x(a, b) = 1 - I_y(b, a) (DLMF 8.17.4), unless that would '
    'leave next to nothing.';

CREATE FUNCTION spectrum._beta_log_odds(
    p_log_p double precision,
    p_a double precision,
    p_b double precision,
    p_start double precision DEFAULT NULL
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_w double precision := coalesce(p_start, ln(p_a) - sqrt(-2 * p_log_p / p_a)
        - ln(p_b + sqrt(-2 * p_log_p * p_b) - p_log_p));
    v_odds double precision;
    v_excess double precision;
    v_log_cdf double precision;
    v_log_width double precision;
    v_step double precision;
BEGIN
    FOR v_try IN 1..200 LOOP
        v_odds := exp(greatest(least(v_w, 400), -400));
        v_excess := p_b / (1 + 1 / v_odds) - p_a / (1 + v_odds);
        v_log_cdf := spectrum._log_beta_cdf(v_w, v_excess, p_a, p_b);
        v_log_width := v_log_cdf - spectrum._log_beta_density(v_w, v_excess, p_a, p_b);
        v_step := (p_log_p - v_log_cdf) * exp(greatest(least(v_log_width, 231), -231));
        v_w := v_w + v_step;
        -- one more step squares the error; still climbing past e^2000, any quantile is at its end
        EXIT WHEN abs(p_log_p - v_log_cdf) < 1e-6
            OR abs(v_step) < 1e-15 * greatest(abs(v_w), 1)
            OR (v_w > 2000 AND v_step > 0);
    END LOOP;
    RETURN v_w;
END
$$;
COMMENT ON FUNCTION spectrum._beta_log_odds(
    double precision, double precision, double precision, double precision
) IS
    'The log odds at which ln I_x(a, b) is p_log_p. ln I_x is concave in the log odds, so that '
    'Newton''s method climbs to the root from any start below it, where its first step also leads '
    'from a start above. Unless given, the start is near the tail bounds of the two gamma '
    'variables whose ratio the odds are (Laurent and Massart 2000, lemma 1).';

CREATE FUNCTION spectrum._beta_excess(
    p_x double precision, p_a double precision, p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_n double precision := p_a + p_b;
    v_n_rest double precision;
    v_n_high double precision;
    v_x_high double precision;
    v_nx double precision;
    v_nx_rest double precision;
BEGIN
    IF p_x < 1e-200 THEN
        RETURN -p_a;
    END IF;
    v_nx := v_n * p_x;
    IF v_nx < p_a / 2 OR v_nx > p_a * 2 THEN
        RETURN v_nx - p_a;
    END IF;
    -- what rounding took from a + b, and from n x (its factors split into halves of 26 bits)
    v_n_rest := least(p_a, p_b) - (v_n - greatest(p_a, p_b));
    v_n_high := v_n * 134217729 - (v_n * 134217729 - v_n);
    v_x_high := p_x * 134217729 - (p_x * 134217729 - p_x);
    v_nx_rest := v_n_high * v_x_high - v_nx
        + v_n_high * (p_x - v_x_high) + (v_n - v_n_high) * v_x_high
        + (v_n - v_n_high) * (p_x - v_x_high);
    RETURN v_nx - p_a + (v_nx_rest + v_n_rest * p_x);
END
$$;
COMMENT ON FUNCTION spectrum._beta_excess(double precision, double precision, double precision) IS
    '(a + b) x - a, rounded once: the sum and the product are kept exact (Dekker 1971).';
