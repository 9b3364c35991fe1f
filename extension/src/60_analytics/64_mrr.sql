-- Room 60, recurring revenue: what subscription events say, and the rule that turns one account's
-- events into movements of its MRR. Both are pure: they see what they are given and no table. The
-- one reader of events here is analytics._subscription_events. Read by 64_mrr_report.sql.
--
-- An event sets the MRR of its subscription from its time on; a cancellation sets it to nothing.
-- What an account pays is the sum of its subscriptions, in each currency by itself.

CREATE FUNCTION analytics._per_year(p_interval text)
RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN lower(p_interval) IN ('day', 'daily') THEN 365
        WHEN lower(p_interval) IN ('week', 'weekly') THEN 52
        WHEN lower(p_interval) IN ('month', 'monthly') THEN 12
        WHEN lower(p_interval) IN ('quarter', 'quarterly') THEN 4
        WHEN lower(p_interval) IN ('year', 'yearly', 'annual', 'annually') THEN 1
    END
$$;
COMMENT ON FUNCTION analytics._per_year(text) IS
    'How often a year an amount is paid, by the name of its interval; NULL for no such name.';

CREATE FUNCTION analytics._property_number(p_value jsonb)
RETURNS numeric
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_number numeric := CASE jsonb_typeof(p_value)
        WHEN 'number' THEN p_value::numeric
        WHEN 'string' THEN analytics._text_number(p_value #>> '{}')
    END;
BEGIN
    RETURN CASE WHEN abs(v_number) < 1e15 THEN v_number END;
END
$$;
COMMENT ON FUNCTION analytics._property_number(jsonb) IS
    'The number that a property is: below 10^15 in size, or a text that is exactly one. Else NULL.';

CREATE FUNCTION analytics._read_subscription(
    p_event_type text,
    p_properties jsonb,
    p_currency text,
    OUT subscription text,
    OUT mrr numeric,
    OUT currency text,
    OUT place integer,
    OUT problem text
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_field text := CASE WHEN p_properties -> 'mrr' <> 'null' THEN 'mrr' ELSE 'amount' END;
    v_amount numeric := analytics._property_number(p_properties -> v_field);
    v_per_year integer := CASE v_field
        WHEN 'mrr' THEN 12
        ELSE analytics._per_year(p_properties ->> 'interval')
    END;
BEGIN
    place := array_position(
        '{subscription_cancelled, subscription_started, subscription_changed}', p_event_type
    );
    subscription := coalesce(p_properties ->> 'subscription_id', '');
    IF jsonb_typeof(p_properties -> 'subscription_id') NOT IN ('string', 'number', 'null') THEN
        problem := spectrum._complaint(
            'properties.subscription_id', 'a text', p_properties -> 'subscription_id'
        );
    ELSIF p_event_type = 'subscription_cancelled' THEN
        mrr := 0;
    ELSIF v_amount IS NULL OR v_amount < 0 THEN
        problem := spectrum._complaint(
            CASE WHEN p_properties -> v_field <> 'null' THEN 'properties.' || v_field
                ELSE 'properties.mrr or properties.amount' END,
            'a number from 0 to below 10^15', p_properties -> v_field
        );
    ELSIF v_per_year IS NULL THEN
        problem := spectrum._complaint(
            'properties.interval', 'day, week, month, quarter or year', p_properties -> 'interval'
        );
    ELSIF p_properties -> 'currency' <> 'null' AND (
        jsonb_typeof(p_properties -> 'currency') <> 'string'
        OR p_properties ->> 'currency' !~ '^[A-Za-z]{3}$'
    ) THEN
        problem := spectrum._complaint(
            'properties.currency', 'three letters', p_properties -> 'currency'
        );
    ELSE
        mrr := trim_scale(v_amount * v_per_year / 12);
        currency := coalesce(upper(p_properties ->> 'currency'), p_currency);
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._read_subscription(text, jsonb, text) IS
    'What a subscription event sets: the MRR of one subscription (empty: the account''s only one) '
    'and its currency, NULL where it is cancelled; its place among events of the same time; or, '
    'in problem, why it cannot be read.';

CREATE FUNCTION analytics._subscription_keys()
RETURNS integer[]
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN ARRAY(
        SELECT types.event_type_key FROM analytics.event_types AS types
        WHERE types.event_type IN (
            'subscription_started', 'subscription_changed', 'subscription_cancelled'
        )
    );
END
$$;
COMMENT ON FUNCTION analytics._subscription_keys() IS 'Event types that move recurring revenue.';

CREATE FUNCTION analytics._subscription_events(p_account text)
RETURNS TABLE (
    account_id text,
    account_key bigint,
    event_id uuid,
    event_type text,
    occurred_at timestamptz,
    subscription text,
    mrr numeric,
    currency text,
    place integer,
    problem text
)
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_currency text := (SELECT s.currency FROM analytics.settings AS s);
    v_keys integer[] := analytics._subscription_keys();
BEGIN
    RETURN QUERY
    SELECT e.account_id, e.account_key, e.event_id, e.event_type, e.occurred_at,
        r.subscription, r.mrr, r.currency, r.place,
        CASE WHEN e.account_key = 0
            THEN spectrum._complaint('account_id', 'an account', NULL)
            ELSE r.problem
        END
    FROM analytics.events AS e
    CROSS JOIN LATERAL analytics._read_subscription(
        e.event_type, e.properties, v_currency
    ) AS r
    WHERE e.event_type_key = ANY (v_keys)
        AND (p_account IS NULL OR e.account_id = p_account);
END
$$;
COMMENT ON FUNCTION analytics._subscription_events(text) IS
    'The subscription events of one account (NULL: of all), as they are read. Whether they name a '
    'user does not matter. One without an account is no account''s, which is a problem too.';

CREATE FUNCTION analytics._movement_starts(p_times timestamptz[])
RETURNS timestamptz[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_at timestamptz;
    v_start timestamptz;
    v_starts timestamptz[] := '{}'::timestamptz[];
BEGIN
    FOREACH v_at IN ARRAY p_times LOOP
        IF v_start IS NULL OR v_at >= v_start + interval '60 minutes' THEN
            v_start := v_at;
        END IF;
        v_starts := array_append(v_starts, v_start);
    END LOOP;
    RETURN v_starts;
END
$$;
COMMENT ON FUNCTION analytics._movement_starts(timestamptz[]) IS
    'For ascending times of changes: when the movement began that each is part of. The 60 minutes '
    'of a movement run from its first change.';

CREATE FUNCTION analytics._mrr_movements(
    p_account_keys bigint[],
    p_times timestamptz[],
    p_places integer[],
    p_event_ids uuid[],
    p_subscriptions text[],
    p_mrr numeric[],
    p_currencies text[]
)
RETURNS TABLE (
    account_key bigint,
    currency text,
    moved_at timestamptz,
    movement text,
    mrr_before numeric,
    mrr_after numeric
)
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    WITH states AS (
        SELECT e.account_key, e.at, e.mrr, e.currency,
            lag(e.mrr) OVER subscriptions AS mrr_before,
            lag(e.currency) OVER subscriptions AS currency_before
        FROM unnest(
            p_account_keys, p_times, p_places, p_event_ids, p_subscriptions, p_mrr, p_currencies
        ) AS e (account_key, at, place, event_id, subscription, mrr, currency)
        WINDOW subscriptions AS (
            PARTITION BY e.account_key, e.subscription ORDER BY e.at, e.place, e.event_id
        )
    ),
    changes AS (
        -- What the account pays changed at this time. A subscription that changes its currency
        -- ends in one and begins in the other.
        SELECT s.account_key, c.currency, s.at, sum(c.change) AS change
        FROM states AS s
        CROSS JOIN LATERAL (
            VALUES (s.currency, s.mrr), (s.currency_before, -s.mrr_before)
        ) AS c (currency, change)
        WHERE c.change <> 0
        GROUP BY s.account_key, c.currency, s.at
        HAVING sum(c.change) <> 0
    ),
    histories AS (
        SELECT c.account_key, c.currency, array_agg(c.at ORDER BY c.at) AS times,
            array_agg(c.change ORDER BY c.at) AS changes
        FROM changes AS c
        GROUP BY c.account_key, c.currency
    ),
    movements AS (
        SELECT h.account_key, h.currency, m.moved_at, sum(m.change) AS change
        FROM histories AS h
        CROSS JOIN LATERAL unnest(
            analytics._movement_starts(h.times), h.changes
        ) AS m (moved_at, change)
        GROUP BY h.account_key, h.currency, m.moved_at
        HAVING sum(m.change) <> 0
    ),
    balances AS (
        SELECT m.account_key, m.currency, m.moved_at, m.change,
            row_number() OVER account AS number,
            sum(m.change) OVER account AS mrr_after
        FROM movements AS m
        WINDOW account AS (PARTITION BY m.account_key, m.currency ORDER BY m.moved_at)
    )
    SELECT b.account_key, b.currency, b.moved_at,
        CASE
            WHEN b.number = 1 THEN 'new'
            WHEN b.mrr_after = b.change THEN 'reactivation'
            WHEN b.mrr_after = 0 THEN 'churn'
            WHEN b.change > 0 THEN 'expansion'
            ELSE 'contraction'
        END,
        b.mrr_after - b.change,
        b.mrr_after
    FROM balances AS b;
END
$$;
COMMENT ON FUNCTION analytics._mrr_movements(
    bigint[], timestamptz[], integer[], uuid[], text[], numeric[], text[]
) IS
    'The rule: the movements of each account''s MRR by currency, out of all its readable '
    'subscription events, given as columns in any order. An account''s movements depend on its own '
    'events alone, so any accounts can be asked for together.';
