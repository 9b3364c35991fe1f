-- Room 70, distributions: normal, Student t, chi-square and beta, each as cdf, sf (upper tail,
-- 1 - cdf) and quantile. No data; read by tests.sql, by the experiments and by anyone.
--
-- All are the regularized incomplete beta function I_x(a, b) of incomplete_beta.sql:
--   Student t    P(|T| > t) = I_x(df / 2, 1 / 2) at the odds df : t^2 (A&S 26.5.27)
--   normal       its limit: double precision sees no difference from df = 1e30; its quantile, from
--                which that of t sets out, by rational functions
--   chi-square   P(X <= x) = P(df / 2, x / 2) (DLMF 8.2.4), and the incomplete gamma function
--                P(a, g) is the limit of I_x(a, B) at the odds g : B for large B
--
-- Relative errors stay below 1e-12 wherever the result is at least 1e-300, for shapes and degrees
-- of freedom from 1e-8 to 1e12; smaller results may be 0. NULL gives NULL, NaN gives NaN, an
-- impossible parameter raises 22023, and nothing else does. Parameters below 1e-100 are read as
-- 1e-100, shapes above 1e100 as 1e100, Student's degrees of freedom above 1e30 as 1e30.

CREATE FUNCTION spectrum._beta_tail(
    p_x double precision,
    p_a double precision,
    p_b double precision,
    p_is_upper boolean
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := greatest(least(p_a, 1e100), 1e-100);
    v_b double precision := greatest(least(p_b, 1e100), 1e-100);
    v_log_odds double precision;
    v_excess double precision;
BEGIN
    PERFORM spectrum._check_positive('p_a', p_a);
    PERFORM spectrum._check_positive('p_b', p_b);
    IF 'NaN' IN (p_x, p_a, p_b) THEN
        RETURN double precision 'NaN';
    ELSIF p_x <= 0 OR p_x >= 1 THEN
        RETURN CASE WHEN (p_x >= 1) = p_is_upper THEN 0 ELSE 1 END;
    END IF;

    v_log_odds := ln(p_x / (1 - p_x));
    v_excess := CASE
        WHEN p_x <= 0.5 THEN spectrum._beta_excess(p_x, v_a, v_b)
        ELSE -spectrum._beta_excess(1 - p_x, v_b, v_a)
    END;
    RETURN spectrum._exponential(CASE
        WHEN p_is_upper THEN spectrum._log_beta_cdf(-v_log_odds, -v_excess, v_b, v_a)
        ELSE spectrum._log_beta_cdf(v_log_odds, v_excess, v_a, v_b)
    END);
END
$$;
COMMENT ON FUNCTION spectrum._beta_tail(
    double precision, double precision, double precision, boolean
) IS
    'P(X > x) or P(X <= x) of a beta variable.';

CREATE FUNCTION spectrum._chi_square_limit(p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN 1e18 * greatest(p_df, 1) * greatest(p_df, 1);
END
$$;
COMMENT ON FUNCTION spectrum._chi_square_limit(double precision) IS
    'A second shape B so large that B times the odds of a beta variable (df / 2, B) is a gamma '
    'variable of shape df / 2 in double precision.';

CREATE FUNCTION spectrum._chi_square_tail(
    p_x double precision, p_df double precision, p_is_upper boolean
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := greatest(p_df, 2e-100) / 2;
    v_b double precision;
    v_x double precision;
    v_log_odds double precision;
    v_excess double precision;
BEGIN
    PERFORM spectrum._check_positive('p_df', p_df);
    IF 'NaN' IN (p_x, p_df) THEN
        RETURN double precision 'NaN';
    ELSIF p_x <= 0 THEN
        RETURN CASE WHEN p_is_upper THEN 1 ELSE 0 END;
    ELSIF p_df > 1e32 THEN
        -- neighbours among the numbers of this size are standard deviations apart
        RETURN CASE WHEN p_x = p_df THEN 0.5 WHEN (p_x > p_df) = p_is_upper THEN 0 ELSE 1 END;
    END IF;

    -- from 100 (df + 100) on the upper tail is 0, and x must stay far below B
    v_x := least(p_x, 100 * (p_df + 100));
    v_b := spectrum._chi_square_limit(p_df);
    v_log_odds := ln(v_x) - ln(2 * v_b);
    v_excess := greatest(v_x, 1e-200) / 2 - v_a;
    RETURN spectrum._exponential(CASE
        WHEN p_is_upper THEN spectrum._log_beta_cdf(-v_log_odds, -v_excess, v_b, v_a)
        ELSE spectrum._log_beta_cdf(v_log_odds, v_excess, v_a, v_b)
    END);
END
$$;
COMMENT ON FUNCTION spectrum._chi_square_tail(double precision, double precision, boolean) IS
    'P(X > x) or P(X <= x) of a chi-square variable, as the limit of the beta distribution.';

CREATE FUNCTION spectrum.beta_cdf(
    p_x double precision, p_a double precision, p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum._beta_tail(p_x, p_a, p_b, false);
END
$$;
COMMENT ON FUNCTION spectrum.beta_cdf(double precision, double precision, double precision) IS
    'P(X <= x) of a beta variable with shapes a > 0 and b > 0: the regularized incomplete beta '
    'function I_x(a, b) (DLMF 8.17.2); 0 for x <= 0, 1 for x >= 1.';

CREATE FUNCTION spectrum.beta_sf(
    p_x double precision, p_a double precision, p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum._beta_tail(p_x, p_a, p_b, true);
END
$$;
COMMENT ON FUNCTION spectrum.beta_sf(double precision, double precision, double precision) IS
    'P(X > x) of a beta variable with shapes a > 0 and b > 0, exact where beta_cdf is near 1.';

CREATE FUNCTION spectrum.beta_quantile(
    p_p double precision, p_a double precision, p_b double precision
)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := greatest(least(p_a, 1e100), 1e-100);
    v_b double precision := greatest(least(p_b, 1e100), 1e-100);
    v_log_odds double precision;
    v_lesser double precision;
BEGIN
    PERFORM spectrum._check_probability('p_p', p_p);
    PERFORM spectrum._check_positive('p_a', p_a);
    PERFORM spectrum._check_positive('p_b', p_b);
    IF 'NaN' IN (p_p, p_a, p_b) THEN
        RETURN double precision 'NaN';
    ELSIF p_p IN (0, 1) THEN
        RETURN p_p;
    END IF;

    v_log_odds := CASE
        WHEN p_p <= 0.5 THEN spectrum._beta_log_odds(ln(p_p), v_a, v_b)
        ELSE -spectrum._beta_log_odds(ln(1 - p_p), v_b, v_a)
    END;
    v_lesser := spectrum._exponential(-abs(v_log_odds));
    RETURN CASE WHEN v_log_odds < 0 THEN v_lesser ELSE 1 END / (1 + v_lesser);
END
$$;
COMMENT ON FUNCTION spectrum.beta_quantile(double precision, double precision, double precision) IS
    'The x in [0, 1] with beta_cdf(x, a, b) = p, for p in [0, 1]. Newton''s method on ln I_x(a, b) '
    'over the log odds of x.';

CREATE FUNCTION spectrum.chi_square_cdf(p_x double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum._chi_square_tail(p_x, p_df, false);
END
$$;
COMMENT ON FUNCTION spectrum.chi_square_cdf(double precision, double precision) IS
    'P(X <= x) of a chi-square variable with df > 0 degrees of freedom: the regularized incomplete '
    'gamma function P(df / 2, x / 2) (DLMF 8.2.4); 0 for x <= 0.';

CREATE FUNCTION spectrum.chi_square_sf(p_x double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum._chi_square_tail(p_x, p_df, true);
END
$$;
COMMENT ON FUNCTION spectrum.chi_square_sf(double precision, double precision) IS
    'P(X > x) of a chi-square variable with df > 0 degrees of freedom, the p-value of a chi-square '
    'test: Q(df / 2, x / 2) (DLMF 8.2.4); 1 for x <= 0.';

CREATE FUNCTION spectrum.chi_square_quantile(p_p double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_a double precision := greatest(p_df, 2e-100) / 2;
    v_b double precision;
BEGIN
    PERFORM spectrum._check_probability('p_p', p_p);
    PERFORM spectrum._check_positive('p_df', p_df);
    IF 'NaN' IN (p_p, p_df) THEN
        RETURN double precision 'NaN';
    ELSIF p_p IN (0, 1) THEN
        RETURN CASE WHEN p_p = 0 THEN 0 ELSE double precision 'Infinity' END;
    ELSIF p_df > 1e32 THEN
        RETURN p_df;
    END IF;

    v_b := spectrum._chi_square_limit(p_df);
    RETURN spectrum._exponential(ln(2 * v_b) + CASE
        WHEN p_p <= 0.5 THEN spectrum._beta_log_odds(ln(p_p), v_a, v_b)
        ELSE -spectrum._beta_log_odds(ln(1 - p_p), v_b, v_a)
    END);
END
$$;
COMMENT ON FUNCTION spectrum.chi_square_quantile(double precision, double precision) IS
    'The x with chi_square_cdf(x, df) = p, for p in [0, 1]; Infinity for p = 1. Newton''s method, '
    'as in beta_quantile.';

CREATE FUNCTION spectrum.student_t_sf(p_t double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_df double precision := greatest(least(p_df, 1e30), 1e-100);
    v_square double precision := greatest(least(abs(p_t), 1e100), 1e-100) ^ 2;
    v_log_odds double precision;
    v_half_tail double precision;
BEGIN
    PERFORM spectrum._check_number('p_df', p_df, p_df > 0, 'a positive number, or Infinity');
    IF 'NaN' IN (p_t, p_df) THEN
        RETURN double precision 'NaN';
    ELSIF p_t = 0 THEN
        RETURN 0.5;
    ELSIF abs(p_t) = 'Infinity' THEN
        RETURN CASE WHEN p_t > 0 THEN 0 ELSE 1 END;
    END IF;

    v_log_odds := ln(v_df) - 2 * ln(abs(p_t));
    v_half_tail := spectrum._exponential(spectrum._log_beta_cdf(
        v_log_odds, (1 - v_square) / (1 + v_square / v_df) / 2, v_df / 2, 0.5
    ) - ln(2::double precision));
    RETURN CASE WHEN p_t > 0 THEN v_half_tail ELSE 1 - v_half_tail END;
END
$$;
COMMENT ON FUNCTION spectrum.student_t_sf(double precision, double precision) IS
    'P(T > t) of Student''s t with df > 0 degrees of freedom (Infinity: normal): for t > 0 it is '
    'I_x(df / 2, 1 / 2) / 2 with x = df / (df + t^2) (A&S 26.5.27). The two-sided p-value of t is '
    '2 * student_t_sf(abs(t), df).';

CREATE FUNCTION spectrum.student_t_cdf(p_t double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.student_t_sf(-p_t, p_df);
END
$$;
COMMENT ON FUNCTION spectrum.student_t_cdf(double precision, double precision) IS
    'P(T <= t) of Student''s t with df > 0 degrees of freedom: student_t_sf(-t, df).';

CREATE FUNCTION spectrum._student_t_guess(p_tail double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_z double precision := -spectrum.normal_quantile(p_tail);
    v_square double precision := v_z * v_z;
BEGIN
    RETURN v_z * (1 + (
        (v_square + 1) / 4 + (
            ((5 * v_square + 16) * v_square + 3) / 96 + (
                (((3 * v_square + 19) * v_square + 17) * v_square - 15) / 384
                + ((((79 * v_square + 776) * v_square + 1482) * v_square - 1920) * v_square - 945)
                    / 92160 / p_df
            ) / p_df
        ) / p_df
    ) / p_df);
END
$$;
COMMENT ON FUNCTION spectrum._student_t_guess(double precision, double precision) IS
    'About the t whose upper tail is p_tail < 0.25: the normal quantile and four terms of its '
    'expansion in 1 / df (A&S 26.7.5), good where df is large against t^2.';

CREATE FUNCTION spectrum.student_t_quantile(p_p double precision, p_df double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_df double precision := greatest(least(p_df, 1e30), 1e-100);
    v_tail double precision := least(p_p, 1 - p_p);
    v_guess double precision;
    v_log_square double precision;
BEGIN
    PERFORM spectrum._check_probability('p_p', p_p);
    PERFORM spectrum._check_number('p_df', p_df, p_df > 0, 'a positive number, or Infinity');
    IF 'NaN' IN (p_p, p_df) THEN
        RETURN double precision 'NaN';
    ELSIF p_p IN (0, 0.5, 1) THEN
        RETURN CASE WHEN p_p = 0.5 THEN 0 ELSE sign(p_p - 0.5) * 'Infinity' END;
    END IF;

    IF v_tail BETWEEN 1e-6 AND 0.25 AND p_df > 10 THEN
        v_guess := ln(v_df) - 2 * ln(spectrum._student_t_guess(v_tail, v_df));
    END IF;
    -- near the centre by the probability between -t and t, which is as exact as p - 1/2
    v_log_square := ln(v_df) + CASE
        WHEN v_tail < 0.25
            THEN -spectrum._beta_log_odds(
                ln(v_tail) + ln(2::double precision), v_df / 2, 0.5, v_guess)
        ELSE spectrum._beta_log_odds(ln(abs(2 * p_p - 1)), 0.5, v_df / 2)
    END;
    RETURN sign(p_p - 0.5) * spectrum._exponential(v_log_square / 2);
END
$$;
COMMENT ON FUNCTION spectrum.student_t_quantile(double precision, double precision) IS
    'The t with student_t_cdf(t, df) = p, for p in [0, 1]; -Infinity for 0, Infinity for 1 and '
    'beyond the range of double precision. Newton''s method as in beta_quantile.';

CREATE FUNCTION spectrum.normal_cdf(p_x double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.student_t_sf(-p_x, 'Infinity');
END
$$;
COMMENT ON FUNCTION spectrum.normal_cdf(double precision) IS
    'P(X <= x) of the standard normal distribution: Student''s t with infinite df.';

CREATE FUNCTION spectrum.normal_sf(p_x double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN spectrum.student_t_sf(p_x, 'Infinity');
END
$$;
COMMENT ON FUNCTION spectrum.normal_sf(double precision) IS
    'P(X > x) of the standard normal distribution. The two-sided p-value of z is '
    '2 * normal_sf(abs(z)).';

CREATE FUNCTION spectrum._normal_tail_quantile(p_r double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_s double precision := p_r - CASE WHEN p_r <= 5 THEN 1.6 ELSE 5 END;
BEGIN
    IF p_r <= 5 THEN
        RETURN (((((((7.74545014278341407640e-4 * v_s + 2.27238449892691845833e-2) * v_s
            + 2.41780725177450611770e-1) * v_s + 1.27045825245236838258e0) * v_s
            + 3.64784832476320460504e0) * v_s + 5.76949722146069140550e0) * v_s
            + 4.63033784615654529590e0) * v_s + 1.42343711074968357734e0)
        / (((((((1.05075007164441684324e-9 * v_s + 5.47593808499534494600e-4) * v_s
            + 1.51986665636164571966e-2) * v_s + 1.48103976427480074590e-1) * v_s
            + 6.89767334985100004550e-1) * v_s + 1.67638483018380384940e0) * v_s
            + 2.05319162663775882187e0) * v_s + 1);
    END IF;
    RETURN (((((((2.01033439929228813265e-7 * v_s + 2.71155556874348757815e-5) * v_s
        + 1.24266094738807843860e-3) * v_s + 2.65321895265761230930e-2) * v_s
        + 2.96560571828504891230e-1) * v_s + 1.78482653991729133580e0) * v_s
        + 5.46378491116411436990e0) * v_s + 6.65790464350110377720e0)
    / (((((((2.04426310338993978564e-15 * v_s + 1.42151175831644588870e-7) * v_s
        + 1.84631831751005468180e-5) * v_s + 7.86869131145613259100e-4) * v_s
        + 1.48753612908506148525e-2) * v_s + 1.36929880922735805310e-1) * v_s
        + 5.99832206555887937690e-1) * v_s + 1);
END
$$;
COMMENT ON FUNCTION spectrum._normal_tail_quantile(double precision) IS
    'The x whose upper tail is exp(-r^2), for tails below 0.075: see normal_quantile.';

CREATE FUNCTION spectrum.normal_quantile(p_p double precision)
RETURNS double precision
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_q double precision := p_p - 0.5;
    v_s double precision;
BEGIN
    PERFORM spectrum._check_probability('p_p', p_p);
    IF p_p IN (0, 1, 'NaN') THEN
        RETURN CASE p_p WHEN 0 THEN '-Infinity' WHEN 1 THEN 'Infinity' ELSE p_p END;
    ELSIF abs(v_q) > 0.425 THEN
        RETURN sign(v_q) * spectrum._normal_tail_quantile(sqrt(-ln(least(p_p, 1 - p_p))));
    END IF;
    v_s := 0.180625 - v_q * v_q;
    RETURN v_q * (((((((2509.0809287301226727 * v_s + 33430.575583588128105) * v_s
        + 67265.770927008700853) * v_s + 45921.953931549871457) * v_s
        + 13731.693765509461125) * v_s + 1971.5909503065514427) * v_s
        + 133.14166789178437745) * v_s + 3.387132872796366608)
    / (((((((5226.495278852545925 * v_s + 28729.085735721942674) * v_s
        + 39307.895800092710610) * v_s + 21213.794301586595867) * v_s
        + 5394.1960214247511077) * v_s + 687.1870074920579083) * v_s
        + 42.313330701600911252) * v_s + 1);
END
$$;
COMMENT ON FUNCTION spectrum.normal_quantile(double precision) IS
    'The x with normal_cdf(x) = p, for p in [0, 1]; -Infinity for 0, Infinity for 1. By three '
    'rational functions that are exact to 16 digits (Wichura 1988, algorithm AS 241).';
