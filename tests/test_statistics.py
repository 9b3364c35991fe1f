"""Statistics: intervals, tests and methods against SciPy, NumPy and mpmath."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import mpmath as mp
import numpy as np
import psycopg
import pytest
from mpmath import mpf
from scipy import special, stats

LIMIT = 1e-10
NAN = math.nan


@pytest.fixture(autouse=True)
def precision() -> Iterable[None]:
    with mp.workdps(45):
        yield


def row(db: psycopg.Connection, function: str, *arguments: Any) -> tuple:
    marks = ", ".join(["%s"] * len(arguments))
    return db.execute(f"SELECT * FROM spectrum.{function}({marks})", arguments).fetchone()


COUNTS = [
    (0, 10), (10, 10), (1, 10), (56, 70), (48, 80), (1, 1), (3, 100000), (99990, 100000),
    (20034, 44700), (123456789, 987654321),
]  # fmt: skip


def test_wilson_interval(db: psycopg.Connection) -> None:
    for (x, n), confidence in itertools.product(COUNTS, (0.5, 0.9, 0.95, 0.999)):
        z = -mpf(float(special.ndtri((1 - confidence) / 2)))
        p, n_ = mpf(x) / n, mpf(n)
        half = z * mp.sqrt(p * (1 - p) / n_ + z * z / (4 * n_ * n_))
        truth = [(p + z * z / (2 * n_) + s * half) / (1 + z * z / n_) for s in (-1, 1)]
        low, high = row(db, "wilson_interval", x, n, confidence)
        assert low == pytest.approx(float(truth[0]), rel=LIMIT, abs=1e-40)
        assert high == pytest.approx(float(truth[1]), rel=LIMIT)
        if n < 10**6:
            published = stats.binomtest(x, n).proportion_ci(confidence, method="wilson")
            assert (low, high) == pytest.approx(tuple(published), rel=LIMIT, abs=1e-15)
    assert row(db, "wilson_interval", 0, 7)[0] == 0
    assert row(db, "wilson_interval", 7, 7)[1] == 1
    assert row(db, "wilson_interval", 0, 0) == (None, None)
    assert row(db, "wilson_interval", None, 7) == (None, None)


def test_two_proportions(db: psycopg.Connection) -> None:
    for (x1, n1), (x2, n2) in itertools.product(COUNTS, COUNTS):
        z, p_value, difference, low, high = row(db, "two_proportion_test", x1, n1, x2, n2, 0.9)
        p1, p2, pooled = mpf(x1) / n1, mpf(x2) / n2, mpf(x1 + x2) / (n1 + n2)
        assert difference == pytest.approx(float(p1 - p2), rel=LIMIT, abs=1e-15)
        error = mp.sqrt(pooled * (1 - pooled) * (mpf(1) / n1 + mpf(1) / n2))
        if error == 0:
            assert z is None and p_value is None
        else:
            assert z == pytest.approx(float((p1 - p2) / error), rel=LIMIT, abs=1e-12)
            assert p_value == pytest.approx(2 * stats.norm.sf(abs(z)), rel=LIMIT, abs=1e-300)
        low1, high1 = row(db, "wilson_interval", x1, n1, 0.9)
        low2, high2 = row(db, "wilson_interval", x2, n2, 0.9)
        below = math.hypot(p1 - low1, high2 - p2)
        above = math.hypot(high1 - p1, p2 - low2)
        assert (low, high) == pytest.approx((p1 - p2 - below, p1 - p2 + above), abs=1e-12)
    # chi-square without Yates' correction is the square of z
    table = stats.chi2_contingency([[56, 14], [48, 32]], correction=False)
    assert row(db, "two_proportion_test", 56, 70, 48, 80)[1] == pytest.approx(table.pvalue)
    # Newcombe 1998, table II, method 10
    for counts, published in (
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((6, 7, 2, 7), (0.0582, 0.8062)),
        ((5, 56, 0, 29), (-0.0381, 0.1926)),
        ((0, 10, 0, 20), (-0.1611, 0.2775)),
        ((10, 10, 0, 20), (0.6791, 1.0)),
    ):
        low, high = row(db, "two_proportion_test", *counts)[3:]
        assert (round(low, 4), round(high, 4)) == published
    assert row(db, "two_proportion_test", 0, 0, 1, 5) == (None,) * 5


def test_welch(db: psycopg.Connection) -> None:
    rng = np.random.default_rng(7)
    for n1, n2, shift, spread in (
        (2, 3, 0.5, 1), (12, 9, 0, 4), (500, 40, 0.2, 0.1), (30000, 90000, 0.05, 2), (60, 60, 9, 1),
    ):  # fmt: skip
        first, second = rng.normal(shift, 1, n1), rng.normal(0, spread, n2)
        moments = [float(v) for s in (first, second) for v in (len(s), s.mean(), s.var(ddof=1))]
        t, df, p_value, difference, low, high = row(db, "welch_t_test", *moments, 0.99)
        expected = stats.ttest_ind(first, second, equal_var=False)
        interval = expected.confidence_interval(0.99)
        assert difference == pytest.approx(first.mean() - second.mean())
        assert (t, df, p_value) == pytest.approx(
            (expected.statistic, expected.df, expected.pvalue), rel=LIMIT
        )
        assert (low, high) == pytest.approx((interval.low, interval.high), rel=LIMIT)
    assert row(db, "welch_t_test", 5, 3, 0, 9, 2, 0) == (None, None, None, 1, None, None)
    assert row(db, "welch_t_test", 1, 3, 0, 9, 2, 1) == (None, None, None, 1, None, None)
    assert row(db, "welch_t_test", 0, 3, 0, 9, 2, 1) == (None,) * 6
    only_second_varies = row(db, "welch_t_test", 5, 3, 0, 9, 2, 1)
    assert only_second_varies[:2] == pytest.approx((3, 8))


def gradient_variance(
    function: Callable[..., mpf], at: Sequence[float], covariance: Sequence[Sequence[float]]
) -> float:
    """The delta method itself: gradient by mpmath's differences, then g' S g."""
    orders = [tuple(int(i == j) for j in range(len(at))) for i in range(len(at))]
    gradient = [mp.diff(function, tuple(map(mpf, at)), order) for order in orders]
    return float(
        mp.fsum(
            gradient[i] * gradient[j] * covariance[i][j]
            for i, j in itertools.product(range(len(at)), repeat=2)
        )
    )


def test_lift_interval(db: psycopg.Connection) -> None:
    z = special.ndtri(0.975)
    for n1, mean1, var1, n2, mean2, var2 in (
        (100, 5.5, 4.0, 80, 5.0, 3.0), (1e6, 0.02, 0.0196, 2e6, 0.019, 0.018639),
        (10, 0.0, 0.0, 10, 0.5, 0.25), (50, -2.0, 1.0, 50, -3.0, 2.0),
    ):  # fmt: skip
        lift, low, high = row(db, "lift_interval", n1, mean1, var1, n2, mean2, var2)
        assert lift == pytest.approx(mean1 / mean2 - 1)
        covariance = [[var1 / n1, 0], [0, var2 / n2]]
        error = math.sqrt(gradient_variance(lambda x, y: x / y - 1, (mean1, mean2), covariance))
        if error == 0:
            assert low is None and high is None
        else:
            assert (low, high) == pytest.approx((lift - z * error, lift + z * error), rel=LIMIT)
    assert row(db, "lift_interval", 5, 1, 1, 5, 0, 1) == (None, None, None)
    assert row(db, "lift_interval", 0, 1, 1, 5, 3, 1) == (None, None, None)


def test_ratio_variance(db: psycopg.Connection) -> None:
    rng = np.random.default_rng(11)
    sessions = rng.poisson(3, 4000) + 1.0
    clicks = rng.binomial(sessions.astype(int), 0.3) + 0.0
    (var_x, cov), (_, var_y) = np.cov(clicks, sessions)
    arguments = map(float, (len(clicks), clicks.mean(), var_x, sessions.mean(), var_y, cov))
    ratio, variance = row(db, "ratio_variance", *arguments)
    assert ratio == pytest.approx(clicks.sum() / sessions.sum())
    covariance = np.array([[var_x, cov], [cov, var_y]]) / len(clicks)
    at = (clicks.mean(), sessions.mean())
    assert variance == pytest.approx(gradient_variance(lambda x, y: x / y, at, covariance))
    # and it is the variance that resampling the users shows
    samples = rng.integers(0, len(clicks), (2000, len(clicks)))
    resampled = clicks[samples].sum(axis=1) / sessions[samples].sum(axis=1)
    assert variance == pytest.approx(resampled.var(), rel=0.15)
    assert row(db, "ratio_variance", 0, 1, 1, 1, 1, 0) == (None, None)
    assert row(db, "ratio_variance", 9, 1, 1, 0, 1, 0) == (None, None)


def test_sample_ratio_mismatch(db: psycopg.Connection) -> None:
    for counts, weights in (
        ([44700, 45489], [1, 1]),
        ([10, 20, 30], [0.2, 0.3, 0.5]),
        ([0, 5], [1, 9]),
        ([10**12, 10**12 + 10**7], [0.5, 0.5]),
    ):
        chi_square, df, p_value = row(db, "sample_ratio_mismatch", counts, weights)
        planned = np.array(weights) / sum(weights) * sum(counts)
        expected = stats.chisquare(counts, planned)
        assert df == len(counts) - 1
        assert (chi_square, p_value) == pytest.approx(tuple(expected), rel=LIMIT)
    assert row(db, "sample_ratio_mismatch", [0, 0], [1, 1]) == (None, None, None)
    assert row(db, "sample_ratio_mismatch", [5, None], [1, 1]) == (None, None, None)


def test_adjusted_p_values(db: psycopg.Connection) -> None:
    def adjust(values: list, *method: str) -> list:
        return row(db, "adjust_p_values", values, *method)[0]

    rng = np.random.default_rng(3)
    for size in (1, 2, 7, 40):
        p = rng.beta(0.3, 1, size).round(3)  # some of them equal
        assert adjust(p.tolist(), "benjamini_hochberg") == pytest.approx(
            stats.false_discovery_control(p, method="bh")
        )
        # Holm: the largest of (family - rank + 1) * p up to one's own rank
        holm = [min(1, max((p >= other).sum() * other for other in p[p <= own])) for own in p]
        assert adjust(p.tolist()) == pytest.approx(holm)
    with_gaps = adjust([0.04, None, 0.01, NAN, 0.03])
    assert with_gaps[:3] == pytest.approx([0.06, None, 0.03])
    assert math.isnan(with_gaps[3])
    assert adjust([]) == []
    assert adjust([None]) == [None]


def mixture(n: int, estimate: float, error: float, rho2: mpf) -> mpf:
    """How much likelier the data are when the mean is drawn from a normal of variance rho2 (in
    squares of a unit's deviation) than when it is 0: by integration."""
    sigma, share = error * mp.sqrt(n), mp.mpf(n)
    total = share * estimate / sigma
    around, width = total / (share + 1 / rho2), 1 / mp.sqrt(share + 1 / rho2)

    def weigh(mean: mpf) -> mpf:
        return mp.exp(mean * total - share * mean**2 / 2 - mean**2 / (2 * rho2))

    ends = [around + step * width for step in range(-24, 25, 4)]
    return mp.quad(weigh, ends) / mp.sqrt(2 * mp.pi * rho2)


def test_sequential(db: psycopg.Connection) -> None:
    for n, estimate, error, tuning, confidence in (
        (5000, 0.03, 0.01, 5000, 0.95), (100, 0.5, 0.3, 5000, 0.95), (90189, -0.0082, 0.00259,
        1000, 0.99), (2, -1.0, 7.5, 10, 0.5), (10**7, 1e-3, 4e-4, 10**6, 0.8),
    ):  # fmt: skip
        p_value, low, high = row(db, "sequential_test", n, estimate, error, tuning, confidence)
        alpha = 1 - mpf(confidence)
        rho2 = (-2 * mp.log(alpha) + mp.log(1 - 2 * mp.log(alpha))) / tuning
        assert p_value == pytest.approx(float(min(1, 1 / mixture(n, estimate, error, rho2))))
        # the interval ends where the mixture is 1 / alpha times as likely
        for end in (low, high):
            assert mixture(n, end - estimate, error, rho2) == pytest.approx(1 / alpha)
        assert low < estimate < high
    # narrowest against the interval for one look at the n that it is tuned for
    best = row(db, "sequential_test", 1000, 0, 1, 1000)[2]
    for tuning in (500, 900, 1100, 2000):
        assert row(db, "sequential_test", 1000, 0, 1, tuning)[2] > best
    assert row(db, "sequential_test", 0, 1, 1) == (None, None, None)
    assert row(db, "sequential_test", 9, 1, 0) == (None, None, None)
    assert row(db, "sequential_test", 10**6, 1, 1e-9)[0] == 0
    assert all(map(math.isnan, row(db, "sequential_test", 9, NAN, 1)))


def test_sequential_may_be_watched(db: psycopg.Connection) -> None:
    """Of 400 experiments without any effect, each looked at 40 times, hardly one is called."""
    steps = np.random.default_rng(5).normal(0, 1, (400, 40, 50))
    n = np.arange(1, 41) * 50
    means = steps.sum(axis=2).cumsum(axis=1) / n
    looks = [(mean, int(count)) for means_ in means for mean, count in zip(means_, n, strict=True)]
    called = db.execute(
        "SELECT (t).p_value < 0.05 FROM (SELECT place, spectrum.sequential_test(n, mean,"
        " 1 / sqrt(n), 1000) AS t FROM unnest(%s::float8[], %s::int[]) WITH ORDINALITY"
        " AS looks (mean, n, place)) AS t ORDER BY place",
        ([float(mean) for mean, _ in looks], [count for _, count in looks]),
    ).fetchall()
    ever = np.array(called).reshape(400, 40).any(axis=1).mean()
    naive = (np.abs(means) * np.sqrt(n) > 1.96).any(axis=1).mean()
    assert ever <= 0.05 < 0.25 < naive


def test_normal_posterior(db: psycopg.Connection) -> None:
    for difference, error, confidence in itertools.product(
        (-3.0, -0.01, 0.0, 0.2, 7.0), (0.05, 1.0, 400.0), (0.9, 0.95)
    ):
        if abs(difference / error) > 30:
            continue
        chance, low, high, loss = row(db, "normal_posterior", difference, error, confidence)
        belief = stats.norm(difference, error)
        assert chance == pytest.approx(float(mp.ncdf(mpf(difference) / error)), rel=LIMIT)
        assert (low, high) == pytest.approx(belief.interval(confidence), rel=LIMIT)
        below = [difference - step * error for step in range(60, -61, -4)]
        ends = [mpf(end) for end in reversed(below) if end < 0] + [mpf(0)]
        expected = mp.quad(
            lambda x, mean=difference, error=error: -x * mp.npdf(x, mean, error), sorted(ends)
        )
        assert loss == pytest.approx(float(expected), rel=1e-9, abs=1e-200)
    assert row(db, "normal_posterior", 1, 0) == (None,) * 4
    assert row(db, "normal_posterior", 1, None) == (None,) * 4


def test_winsor_bounds(db: psycopg.Connection) -> None:
    rng = np.random.default_rng(17)
    for size, zeros, shift, share in itertools.product(
        (1, 2, 3, 10, 101, 1000), (0, 1, 250), (0, 1, -1, 5, -5), (0.51, 0.75, 0.9, 0.99, 1)
    ):
        amounts = rng.normal(shift, 1, size).round(2)
        low, high = row(db, "winsor_bounds", [Decimal(str(a)) for a in amounts], share, zeros)
        everybody = np.concatenate([amounts, np.zeros(zeros)])
        expected = np.percentile(everybody, [100 - 100 * share, 100 * share])
        assert float(low) == pytest.approx(min(0, expected[0]), rel=1e-12, abs=1e-12)
        assert float(high) == pytest.approx(max(0, expected[1]), rel=1e-12, abs=1e-12)
    assert row(db, "winsor_bounds", "{3, NULL, 5}", 1) == (0, 5)
    assert row(db, "winsor_bounds", "{}", 0.99, 0) == (None, None)
    assert row(db, "winsor_bounds", "{}", 0.99, 5) == (0, 0)


IMPOSSIBLE = [
    ("normal_quantile(-0.1)", "p_p"),
    ("normal_quantile(1.1)", "p_p"),
    ("student_t_cdf(1, 0)", "p_df"),
    ("student_t_quantile(0.5, -1)", "p_df"),
    ("chi_square_sf(1, -2)", "p_df"),
    ("chi_square_cdf(1, 'Infinity')", "p_df"),
    ("beta_cdf(0.5, 0, 1)", "p_a"),
    ("beta_quantile(0.5, 1, -1)", "p_b"),
    ("wilson_interval(-1, 10)", "p_successes"),
    ("wilson_interval(11, 10)", "p_successes"),
    ("wilson_interval(1, 10, 1)", "p_confidence"),
    ("two_proportion_test(1, 10, 3, 2)", "p_x2"),
    ("two_proportion_test(0, -10, 1, 2)", "p_n1"),
    ("two_proportion_test(0, 10, 1, 2, 95)", "p_confidence"),
    ("welch_t_test(5, 1, -1, 5, 1, 1)", "p_var1"),
    ("welch_t_test(5, 1, 1, 5, 1, 1, 0)", "p_confidence"),
    ("lift_interval(-5, 1, 1, 5, 1, 1)", "p_n1"),
    ("ratio_variance(5, 1, 1, 1, -1, 0)", "p_var_y"),
    ("sample_ratio_mismatch('{5}', '{1}')", "p_counts"),
    ("sample_ratio_mismatch('{5,-1}', '{1,1}')", "p_counts"),
    ("sample_ratio_mismatch('{5,6}', '{1,1,1}')", "p_weights"),
    ("sample_ratio_mismatch('{5,6}', '{1,0}')", "p_weights"),
    ("adjust_p_values('{0.1,2}')", "p_values"),
    ("sequential_test(-1, 0, 1)", "p_n"),
    ("sequential_test(1, 0, -1)", "p_error"),
    ("sequential_test(1, 0, 1, 0)", "p_tuning"),
    ("sequential_test(1, 0, 1, 10, 1)", "p_confidence"),
    ("normal_posterior(1, -1)", "p_error"),
    ("normal_posterior(1, 1, 0)", "p_confidence"),
    ("winsor_bounds('{1}', 0.5)", "p_percentile"),
    ("winsor_bounds('{1}', 0.9, -1)", "p_zeros"),
    ("adjust_p_values('{0.1}', 'bonferroni')", "p_method"),
]


def test_impossible_arguments(db: psycopg.Connection) -> None:
    for call, argument in IMPOSSIBLE:
        with pytest.raises(psycopg.errors.InvalidParameterValue) as raised:
            db.execute(f"SELECT spectrum.{call}")
        assert f"argument {argument}:" in raised.value.diag.message_primary, call
        assert raised.value.diag.message_hint, call
