-- Room 60, stickiness: in how many periods of a range users were active. Reads analytics.events
-- through analytics._active_periods. A user adds himself to the one row that is his number of
-- distinct active periods.

CREATE FUNCTION analytics._stickiness(
    p_starts timestamptz[],
    p_is_open boolean,
    p_event text,
    p_account text
)
RETURNS TABLE (periods integer, users_exactly bigint, users_at_least bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH cells AS MATERIALIZED (
        SELECT
            cardinality(u.numbers) AS periods,
            count(*) AS users,
            min(u.numbers[1]) AS first_number
        FROM analytics._active_periods(p_event, p_starts, p_account, false) AS u
        GROUP BY cardinality(u.numbers)
    ),
    range_lengths AS (
        SELECT cardinality(p_starts) - CASE WHEN p_is_open THEN min(c.first_number) ELSE 1 END
            AS periods
        FROM cells AS c
    )
    SELECT
        n.number,
        coalesce(c.users, 0),
        coalesce(sum(c.users) OVER (ORDER BY n.number DESC), 0)::bigint
    FROM range_lengths AS r
    CROSS JOIN generate_series(1, r.periods) AS n (number)
    LEFT JOIN cells AS c ON c.periods = n.number;
END
$$;
COMMENT ON FUNCTION analytics._stickiness(timestamptz[], boolean, text, text) IS
    'Users by their number of active periods among those of p_starts; p_is_open: among those from '
    'the first in which anyone was active.';

CREATE FUNCTION analytics.stickiness(
    p_period text DEFAULT 'day',
    p_from timestamptz DEFAULT NULL,
    p_to timestamptz DEFAULT NULL,
    p_event text DEFAULT NULL,
    p_account text DEFAULT NULL
)
RETURNS TABLE (periods integer, users_exactly bigint, users_at_least bigint)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[];
BEGIN
    PERFORM spectrum._check_choice('p_period', p_period, '{day, week, month}');
    PERFORM analytics._check_range(p_from, p_to);
    SELECT h.starts[coalesce(h.first_number, 1) :] INTO v_starts
    FROM analytics._history_periods(p_period, p_from, p_to) AS h;
    RETURN QUERY
    SELECT s.periods, s.users_exactly, s.users_at_least
    FROM analytics._stickiness(v_starts, p_from IS NULL, p_event, p_account) AS s
    ORDER BY s.periods;
END
$$;
COMMENT ON FUNCTION analytics.stickiness(text, timestamptz, timestamptz, text, text) IS
    'How often users come: of the days, weeks or months that [p_from, p_to) touches, each whole, '
    'in how many was a user active (p_event; NULL: any event). One row for each possible number '
    'from 1 on: the users active in exactly that many periods, and in at least that many. NULL '
    'p_from: from the first active period; NULL p_to: to the last period with an event.';
