"""Distributions of probability: against mpmath in 45 digits, and SciPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import mpmath as mp
import numpy as np
import psycopg
import pytest
from mpmath import mpf
from scipy import special, stats

LIMIT = 1e-10  # relative, wherever the true value is at least FLOOR
FLOOR = mpf("1e-300")
TERM = mpf("1e-30")  # where mpmath's series and fractions end
INFINITY, NAN = math.inf, math.nan

Point = tuple[float, ...]
Tails = tuple[mpf, mpf]  # P(X <= x), P(X > x)


@pytest.fixture(autouse=True)
def precision() -> Iterable[None]:
    with mp.workdps(45):
        yield


def evaluate(db: psycopg.Connection, function: str, points: Sequence[Point]) -> list[float]:
    """The function at every point, in one statement."""
    columns = [list(map(float, column)) for column in zip(*points, strict=True)]
    names = [f"a{number}" for number in range(len(columns))]
    arrays = ", ".join(["%s::double precision[]"] * len(columns))
    query = (
        f"SELECT array_agg(spectrum.{function}({', '.join(names)}) ORDER BY place) "
        f"FROM unnest({arrays}) WITH ORDINALITY AS points ({', '.join(names)}, place)"
    )
    return db.execute(query, columns).fetchone()[0]


def assert_close(
    db: psycopg.Connection,
    function: str,
    points: Sequence[Point],
    truth: Callable[..., Any],
    limit: float = LIMIT,
) -> None:
    errors = []
    for point, value in zip(points, evaluate(db, function, points), strict=True):
        expected = mpf(truth(*point))
        if abs(expected) >= FLOOR:
            errors.append((float(abs(mpf(value) / expected - 1)), point, value))
        else:
            assert abs(value) <= 1.001 * float(FLOOR), f"{function}{point} = {value}"
    worst = max(errors)
    print(f"{function}: {len(points)} points, largest relative error {worst[0]:.1e} at {worst[1]}")
    assert worst[0] < limit, f"{function}{worst[1]} = {worst[2]}"


# --- the truth: other formulas than the extension's, in 45 digits --------------------------------


def normal_tails(x: float) -> Tails:
    return mp.erfc(-mpf(x) / mp.sqrt(2)) / 2, mp.erfc(mpf(x) / mp.sqrt(2)) / 2


def beta_fraction(x: mpf, y: mpf, a: mpf, b: mpf) -> mpf:
    """I_x(a, b) by the continued fraction DLMF 8.17.22 (Lentz), for x not far above the mean."""
    n = a + b
    c, d = mpf(1), 1 / (1 - n * x / (a + 1))
    value = d
    for m in itertools.count(1):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (n + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = 1 + term / c, 1 / (1 + term * d)
            value *= c * d
        if abs(c * d - 1) < TERM:
            break
    logarithm = a * mp.log(x) + b * mp.log(y) - mp.log(a)
    return value * mp.exp(logarithm - mp.loggamma(a) - mp.loggamma(b) + mp.loggamma(n))


@cache
def beta_tails(x: float | mpf, a: float, b: float, y: mpf | None = None) -> Tails:
    x, a, b = mpf(x), mpf(a), mpf(b)
    y = 1 - x if y is None else y
    if x < (a + 1) / (a + b + 2):
        lower = beta_fraction(x, y, a, b)
        return lower, 1 - lower
    upper = beta_fraction(y, x, b, a)
    return 1 - upper, upper


@cache
def student_tails(t: float, df: float) -> Tails:
    t, df = mpf(t), mpf(df)
    x, y = df / (df + t * t), t * t / (df + t * t)
    tail = (beta_tails(x, df / 2, mpf("0.5"), y)[0] if t else mpf(1)) / 2
    return (tail, 1 - tail) if t < 0 else (1 - tail, tail)


@cache
def chi_square_tails(x: float, df: float) -> Tails:
    """By the series DLMF 8.11.4 below the mean, by the continued fraction 8.9.2 above."""
    x, a = mpf(x) / 2, mpf(df) / 2
    factor = mp.exp(a * mp.log(x) - x - mp.loggamma(a))
    if x < a + 1:
        term = total = 1 / a
        for k in itertools.count(1):
            term *= x / (a + k)
            total += term
            if term < total * TERM * (1 - x / (a + k)):
                return factor * total, 1 - factor * total
    b = x + 1 - a
    c, d = mpf("1e400"), 1 / b
    value = d
    for k in itertools.count(1):
        b += 2
        d = 1 / (k * (a - k) * d + b)
        c = b + k * (a - k) / c
        value *= c * d
        if abs(c * d - 1) < TERM:
            return 1 - factor * value, factor * value
    raise AssertionError


def of_lower(tails: Callable[..., Tails]) -> Callable[..., mpf]:
    return lambda *point: tails(*point)[0]


def of_upper(tails: Callable[..., Tails]) -> Callable[..., mpf]:
    return lambda *point: tails(*point)[1]


# --- grids ---------------------------------------------------------------------------------------

NORMAL = [
    (float(x),)
    for x in [*np.linspace(-38, 38, 153), *(s * 10.0**-k for s in (-1, 1) for k in range(1, 20, 3))]
]
STUDENT = [
    (s * t, df)
    for df in (0.1, 0.5, 1, 2, 3.7, 10, 100, 1e4, 1e6, 1e8, 1e10)
    for t in (1e-9, 1e-3, 0.1, 0.5, 1, 1.96, 3, 6, 12, 25, 37, 1e3, 1e6, 1e30, 1e160)
    for s in (-1, 1)
]
DEVIATES = (-36.0, -20.0, -8.0, -3.0, -1.0, -0.1, 0.0, 0.4, 1.0, 2.5, 6.0, 14.0, 25.0, 36.5)
CHI_SQUARE = [
    # Wilson and Hilferty's cube, and for few degrees of freedom powers of ten
    (max(df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3, 10.0 ** (4 * z - 3)), df)
    for df in (1e-3, 0.1, 0.5, 1, 2, 3, 5, 11, 50, 300, 1e3, 1e4, 1e5, 1e6)
    for z in DEVIATES
]
SHAPES = (1e-3, 0.1, 0.5, 1.0, 2.0, 7.5, 40.0, 1e3, 1e5, 1e7)
BETA = [
    (1 / (1 + math.exp(-w)), a, b)
    for a, b in itertools.product(SHAPES, SHAPES)
    for z in DEVIATES[1::2]
    if abs(w := math.log(a / b) + z * math.sqrt(1 / a + 1 / b)) < 36
]
PROBABILITIES = sorted(
    {
        1e-300,
        1e-200,
        1e-100,
        1e-40,
        1e-16,
        1e-8,
        0.001,
        0.025,
        0.2,
        0.25,
        0.4,
        0.5,
        0.5 + 1e-9,
        0.75,
    }
    | {0.95, 0.999, 1 - 1e-9}
)


def test_normal(db: psycopg.Connection) -> None:
    assert_close(db, "normal_cdf", NORMAL, of_lower(normal_tails))
    assert_close(db, "normal_sf", NORMAL, of_upper(normal_tails))


def test_student_t(db: psycopg.Connection) -> None:
    assert_close(db, "student_t_cdf", STUDENT, of_lower(student_tails))
    assert_close(db, "student_t_sf", STUDENT, of_upper(student_tails))
    assert evaluate(db, "student_t_cdf", [(x, INFINITY) for (x,) in NORMAL]) == evaluate(
        db, "normal_cdf", NORMAL
    )


def test_chi_square(db: psycopg.Connection) -> None:
    assert_close(db, "chi_square_sf", CHI_SQUARE, of_upper(chi_square_tails))
    assert_close(db, "chi_square_cdf", CHI_SQUARE, of_lower(chi_square_tails))


def test_beta(db: psycopg.Connection) -> None:
    assert_close(db, "beta_cdf", BETA, of_lower(beta_tails))
    assert_close(db, "beta_sf", BETA, of_upper(beta_tails))


def test_large_shapes(db: psycopg.Connection) -> None:
    """Far beyond any count of events: the error does not grow."""
    far = [(1e9, 1e9, -1), (1e9, 1e9, -30), (1e10, 1e6, -8), (3e4, 1e12, -3), (1e12, 500, 1)]
    points = [
        (1 / (1 + math.exp(-math.log(a / b) - z * math.sqrt(1 / a + 1 / b))), a, b)
        for a, b, z in far
    ]
    assert_close(db, "beta_cdf", points, of_lower(beta_tails))
    points = [(df + z * math.sqrt(2 * df), df) for df in (1e8, 1e10) for z in (0.5, 6, 36)]
    assert_close(db, "chi_square_sf", points, of_upper(chi_square_tails))


def test_quantiles(db: psycopg.Connection) -> None:
    """The error of x follows from that of its probability: dx = dF / F'(x)."""

    def check(
        name: str,
        tails: Callable[..., Tails],
        density: Callable[..., mpf],
        parameters: Sequence[Point],
    ) -> None:
        points = [(p, *shapes) for shapes in parameters for p in PROBABILITIES]
        errors = []
        for point, x in zip(points, evaluate(db, f"{name}_quantile", points), strict=True):
            p, shapes = mpf(point[0]), point[1:]
            if math.isinf(x) or abs(x) < FLOOR or x == 1:
                continue
            lower, upper = tails(x, *shapes)
            difference = lower - p if p < 0.5 else (1 - p) - upper
            error = abs(difference / density(mpf(x), *map(mpf, shapes)) / mpf(x))
            errors.append((float(error), point, x))
        print(f"{name}_quantile: {len(errors)} points, largest relative error {max(errors)[0]:.1e}")
        assert len(errors) > len(points) * 0.6
        assert max(errors)[0] < LIMIT, max(errors)

    check("normal", normal_tails, lambda x: mp.npdf(x), [()])
    check(
        "student_t",
        student_tails,
        lambda t, df: mp.exp(
            mp.loggamma((df + 1) / 2)
            - mp.loggamma(df / 2)
            - (df + 1) / 2 * mp.log1p(t * t / df)
            - mp.log(mp.pi * df) / 2
        ),
        [(df,) for df in (0.1, 0.7, 1, 2, 5, 30, 1e3, 1e6, 1e10)],
    )
    check(
        "chi_square",
        chi_square_tails,
        lambda x, df: mp.exp((df / 2 - 1) * mp.log(x / 2) - x / 2 - mp.loggamma(df / 2)) / 2,
        [(df,) for df in (0.1, 1, 2, 7, 50, 1e3, 1e5)],
    )
    check(
        "beta",
        beta_tails,
        lambda x, a, b: mp.exp(
            (a - 1) * mp.log(x)
            + (b - 1) * mp.log1p(-x)
            + mp.loggamma(a + b)
            - mp.loggamma(a)
            - mp.loggamma(b)
        ),
        list(itertools.product((0.1, 0.5, 1, 4, 100, 1e5), (0.2, 1, 3, 80, 1e6))),
    )


def test_scipy(db: psycopg.Connection) -> None:
    """A wide grid where SciPy is exact itself: moderate shapes, no extreme tail."""
    rng = np.random.default_rng(20240501)
    size = 300
    df = 10 ** rng.uniform(-0.5, 3, size)
    a, b = 10 ** rng.uniform(-0.5, 3, (2, size))
    t, x = rng.standard_t(3, size), rng.beta(a, b)
    p = rng.uniform(0.001, 0.999, size)
    chi = rng.chisquare(df)
    for function, columns, expected in (
        ("normal_cdf", (t,), special.ndtr(t)),
        ("normal_quantile", (p,), special.ndtri(p)),
        ("student_t_cdf", (t, df), stats.t.cdf(t, df)),
        ("student_t_quantile", (p, df), stats.t.ppf(p, df)),
        ("chi_square_sf", (chi, df), stats.chi2.sf(chi, df)),
        ("chi_square_quantile", (p, df), stats.chi2.ppf(p, df)),
        ("beta_cdf", (x, a, b), stats.beta.cdf(x, a, b)),
        ("beta_quantile", (p, a, b), stats.beta.ppf(p, a, b)),
    ):
        got = evaluate(db, function, list(zip(*columns, strict=True)))
        np.testing.assert_allclose(got, expected, rtol=LIMIT, err_msg=function)


def test_values_at_the_ends(db: psycopg.Connection) -> None:
    for function, points, expected in (
        ("normal_cdf", [(-INFINITY,), (-40,), (0,), (40,), (INFINITY,), (NAN,)], [0, 0, 0.5, 1, 1]),
        ("normal_sf", [(-1e308,), (1e308,), (5e-324,), (NAN,)], [1, 0, 0.5]),
        ("normal_quantile", [(0,), (0.5,), (1,), (NAN,)], [-INFINITY, 0, INFINITY]),
        ("student_t_cdf", [(-INFINITY, 3), (0, 3), (INFINITY, 3), (NAN, 3)], [0, 0.5, 1]),
        ("student_t_quantile", [(0, 3), (0.5, 3), (1, 3), (0.2, NAN)], [-INFINITY, 0, INFINITY]),
        ("student_t_quantile", [(1e-100, 0.1), (NAN, 1)], [-INFINITY]),
        ("chi_square_sf", [(-1, 2), (0, 2), (INFINITY, 2), (1e5, 2), (NAN, 2)], [1, 1, 0, 0]),
        ("chi_square_cdf", [(-1, 2), (INFINITY, 2), (1e5, 2), (1, NAN)], [0, 1, 1]),
        ("chi_square_quantile", [(0, 2), (1, 2), (NAN, 2)], [0, INFINITY]),
        ("beta_cdf", [(-1, 2, 3), (0, 2, 3), (1, 2, 3), (7, 2, 3), (NAN, 2, 3)], [0, 0, 1, 1]),
        ("beta_sf", [(0, 2, 3), (1, 2, 3), (INFINITY, 2, 3), (0.5, NAN, 3)], [1, 0, 0]),
        ("beta_quantile", [(0, 2, 3), (1, 2, 3), (0.5, 2, NAN)], [0, 1]),
    ):
        *values, last = evaluate(db, function, points)
        assert values == expected, function
        assert math.isnan(last), function


def test_no_argument_breaks_them(db: psycopg.Connection) -> None:
    """Whatever the doubles are, the answer is a probability: never an underflow, never an error."""
    positive = [5e-324, 1e-120, 1e-30, 1e-9, 0.3, 7, 1e9, 1e33, 1.7e308]
    numbers = [-1.7e308, -3.5, *positive, 1 - 2**-53, INFINITY]
    for function, points in (
        ("normal_cdf", [(x,) for x in numbers]),
        ("student_t_cdf", list(itertools.product(numbers, [*positive, INFINITY]))),
        ("chi_square_sf", list(itertools.product(numbers, positive))),
        ("chi_square_cdf", list(itertools.product(numbers, positive))),
        ("beta_cdf", list(itertools.product(numbers, positive, positive))),
        ("beta_sf", list(itertools.product(numbers, positive, positive))),
    ):
        assert all(0 <= value <= 1 for value in evaluate(db, function, points)), function
    shapes = [1e-12, 1e-3, 1, 1e9, 1.7e308]
    points = list(itertools.product([5e-324, 0.3, 1 - 2**-53], shapes))
    assert not any(map(math.isnan, evaluate(db, "student_t_quantile", points)))
    assert all(value >= 0 for value in evaluate(db, "chi_square_quantile", points))
    points = [(*point, b) for point, b in itertools.product(points, shapes)]
    assert all(0 <= value <= 1 for value in evaluate(db, "beta_quantile", points))
