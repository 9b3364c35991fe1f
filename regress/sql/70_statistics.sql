-- Statistics: known values of the distributions and published examples of the tests.
-- The expected values of the first part come from other formulas in 45 digits (mpmath).
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS spectrum;
RESET client_min_messages;

-- Distributions, from the centre to the far tails, with small and large parameters.
SELECT what, abs(value / expected - 1) < 1e-10 AS ok
FROM (VALUES
    ('normal_cdf(1.96)', spectrum.normal_cdf(1.96), 0.97500210485177956),
    ('normal_cdf(-37)', spectrum.normal_cdf(-37), 5.7255712225245768e-300),
    ('normal_sf(8)', spectrum.normal_sf(8), 6.2209605742717841e-16),
    ('normal_quantile(0.975)', spectrum.normal_quantile(0.975), 1.9599639845400542),
    ('normal_quantile(1e-300)', spectrum.normal_quantile(1e-300), -37.047096299361199),
    ('student_t_cdf(2.571, 5)', spectrum.student_t_cdf(2.571, 5), 0.9750126826580743),
    ('student_t_cdf(-30, 4)', spectrum.student_t_cdf(-30, 4), 3.6764280488306611e-6),
    ('student_t_sf(5, 1e10)', spectrum.student_t_sf(5, 1e10), 2.8665157671103237e-7),
    ('student_t_quantile(0.975, 1)', spectrum.student_t_quantile(0.975, 1), 12.706204736174693),
    ('chi_square_sf(3.841, 1)', spectrum.chi_square_sf(3.841, 1), 0.050013683763956699),
    ('chi_square_sf(1.005e6, 1e6)', spectrum.chi_square_sf(1.005e6, 1e6), 2.0767800946703003e-4),
    ('chi_square_sf(1400, 2)', spectrum.chi_square_sf(1400, 2), 9.8596765437597709e-305),
    ('chi_square_quantile(0.95, 10)', spectrum.chi_square_quantile(0.95, 10), 18.307038053275146),
    ('beta_cdf(0.3, 2, 5)', spectrum.beta_cdf(0.3, 2, 5), 0.579825),
    ('beta_cdf(0.4999, 1e7, 1e7)', spectrum.beta_cdf(0.4999, 1e7, 1e7), 0.18554668535934216),
    ('beta_cdf(1e-20, 15, 4)', spectrum.beta_cdf(1e-20, 15, 4), 8.16e-298),
    ('beta_quantile(0.1, 2, 5)', spectrum.beta_quantile(0.1, 2, 5), 0.092595258913128729)
) AS known (what, value, expected);

-- The ends: no underflow, no overflow; NULL gives NULL, NaN gives NaN.
SELECT spectrum.normal_cdf(-1e300) AS far_left, spectrum.normal_cdf('Infinity') AS far_right,
    spectrum.normal_quantile(0) AS at_0, spectrum.normal_quantile(0.5) AS at_half,
    spectrum.normal_quantile(1) AS at_1, spectrum.normal_cdf(NULL) AS of_null,
    spectrum.normal_cdf('NaN') AS of_nan;
SELECT spectrum.student_t_cdf('-Infinity', 3) AS t,
    spectrum.chi_square_sf('Infinity', 3) AS chi_square,
    spectrum.beta_cdf(-1, 2, 3) AS beta_below, spectrum.beta_cdf(2, 2, 3) AS beta_above;

-- One proportion (Newcombe 1998, Two-sided confidence intervals for the single proportion).
SELECT x, n, round(w.low::numeric, 4) AS low, round(w.high::numeric, 4) AS high
FROM (VALUES (81, 263), (15, 148), (0, 20), (1, 29), (29, 29), (0, 0)) AS example (x, n)
CROSS JOIN LATERAL spectrum.wilson_interval(x, n) AS w;

-- Two proportions (Newcombe 1998, Interval estimation for the difference, table II, method 10).
SELECT x1, n1, x2, n2, round(t.z::numeric, 4) AS z, round(t.p_value::numeric, 6) AS p_value,
    round(t.difference::numeric, 4) AS difference,
    round(t.low::numeric, 4) AS low, round(t.high::numeric, 4) AS high
FROM (VALUES
    (56, 70, 48, 80), (9, 10, 3, 10), (5, 56, 0, 29), (0, 10, 0, 20), (10, 10, 0, 20), (0, 0, 1, 5)
) AS example (x1, n1, x2, n2)
CROSS JOIN LATERAL spectrum.two_proportion_test(x1, n1, x2, n2) AS t;

-- Cookie Cats, a published mobile game experiment: retention after 1 and 7 days, and the split.
SELECT day, round(t.difference::numeric, 5) AS difference, round(t.z::numeric, 4) AS z,
    round(t.p_value::numeric, 6) AS p_value
FROM (VALUES (1, 20119, 20034), (7, 8279, 8502)) AS retained (day, gate_40, gate_30)
CROSS JOIN LATERAL spectrum.two_proportion_test(gate_40, 45489, gate_30, 44700) AS t;
SELECT round(chi_square::numeric, 4) AS chi_square, df, round(p_value::numeric, 6) AS p_value
FROM spectrum.sample_ratio_mismatch('{44700,45489}', '{0.5,0.5}');

-- Two means: Student's sleep data (1908) gives t = -1.8608, df = 17.776, p = 0.07939 and the 95%
-- interval from -3.3655 to 0.2055.
WITH sleep (drug, extra) AS (
    SELECT 1, unnest('{0.7,-1.6,-0.2,-1.2,-0.1,3.4,3.7,0.8,0.0,2.0}'::double precision[])
    UNION ALL
    SELECT 2, unnest('{1.9,0.8,1.1,0.1,-0.1,4.4,5.5,1.6,4.6,3.4}'::double precision[])
),
moments AS (
    SELECT drug, count(*) AS n, avg(extra) AS mean, var_samp(extra) AS var
    FROM sleep GROUP BY drug
)
SELECT round(w.t::numeric, 4) AS t, round(w.df::numeric, 3) AS df,
    round(w.p_value::numeric, 5) AS p_value, round(w.difference::numeric, 2) AS difference,
    round(w.low::numeric, 4) AS low, round(w.high::numeric, 4) AS high
FROM moments AS one
JOIN moments AS two ON one.drug = 1 AND two.drug = 2
CROSS JOIN LATERAL spectrum.welch_t_test(
    one.n, one.mean, one.var, two.n, two.mean, two.var
) AS w;

-- Where there is no answer it is NULL.
SELECT * FROM spectrum.welch_t_test(5, 3, 0, 9, 2, 0);
SELECT z, p_value, difference, round(low::numeric, 4) AS low, round(high::numeric, 4) AS high
FROM spectrum.two_proportion_test(5, 5, 9, 9);
SELECT * FROM spectrum.lift_interval(5, 3, 1, 9, 0, 1);
SELECT * FROM spectrum.sample_ratio_mismatch('{0,0}', '{1,1}');

-- Relative lift of 10% over a baseline of 2%, and clicks per session of 400 users.
SELECT round(lift::numeric, 6) AS lift,
    round(low::numeric, 6) AS low, round(high::numeric, 6) AS high
FROM spectrum.lift_interval(10000, 0.022, 0.022 * 0.978, 10000, 0.02, 0.02 * 0.98);
SELECT ratio, round(sqrt(variance)::numeric, 6) AS standard_error
FROM spectrum.ratio_variance(400, 1.5, 2.25, 5, 9, 3);

-- Several p-values.
SELECT spectrum.adjust_p_values('{0.01,0.04,NULL,0.03,0.005}') AS holm,
    spectrum.adjust_p_values('{0.01,0.04,NULL,0.03,0.005}', 'benjamini_hochberg') AS bh;

-- Cookie Cats once more, watched day by day; the chance that gate 40 wins; where amounts are cut.
SELECT n, round(p_value::numeric, 6) AS p_value, round(low::numeric, 6) AS low,
    round(high::numeric, 6) AS high
FROM (VALUES (1000, 0.0246), (10000, 0.00778), (90189, 0.002592)) AS looks (n, error)
CROSS JOIN LATERAL spectrum.sequential_test(n, -0.008201, error, 50000) AS t;
SELECT round(chance_to_win::numeric, 6) AS chance_to_win, round(low::numeric, 6) AS low,
    round(high::numeric, 6) AS high, round(expected_loss::numeric, 6) AS expected_loss
FROM spectrum.normal_posterior(-0.008201, 0.002592);
SELECT share, b.* FROM (VALUES (0.9), (0.75), (1)) AS shares (share)
CROSS JOIN LATERAL spectrum.winsor_bounds('{-5,1,2,3,4,5,6,7,8,90}', share, 1) AS b;
SELECT * FROM spectrum.sequential_test(0, 1, 1);
SELECT * FROM spectrum.normal_posterior(1, 0);
SELECT * FROM spectrum.winsor_bounds('{}', 0.9);

-- Impossible arguments.
SELECT spectrum.sequential_test(10, 1, 1, 0);
SELECT spectrum.normal_posterior(1, -1);
SELECT spectrum.winsor_bounds('{1}', 0.5);
SELECT spectrum.normal_quantile(1.5);
SELECT spectrum.student_t_cdf(1, 0);
SELECT spectrum.beta_cdf(0.5, -1, 1);
SELECT spectrum.wilson_interval(11, 10);
SELECT spectrum.wilson_interval(5, 10, 95);
SELECT spectrum.welch_t_test(5, 3, -1, 9, 2, 0);
SELECT spectrum.sample_ratio_mismatch('{1,2,3}', '{0.5,0.5}');
SELECT spectrum.adjust_p_values('{0.1}', 'bonferroni');
