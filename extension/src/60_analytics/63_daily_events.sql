-- Room 60, standing trend: events by day and type, a plain sum of the news.

CREATE FUNCTION spectrum._create_daily_events()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('analytics.mv_daily_events') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE analytics.mv_daily_events (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        event_type_key integer NOT NULL,
        events bigint NOT NULL,
        CONSTRAINT mv_daily_events_pkey PRIMARY KEY (report_id, account_id, day, event_type_key)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_daily_events IS
        'Events per account, day and type, and for all accounts together (account_id *), kept by '
        'refreshes. Read it through analytics.daily_events.';
    COMMENT ON COLUMN analytics.mv_daily_events.report_id IS 'spectrum.reports, kind volume.';
    COMMENT ON COLUMN analytics.mv_daily_events.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_daily_events.event_type_key IS 'dim_event_types.';
    COMMENT ON COLUMN analytics.mv_daily_events.events IS 'Events, of the unknown user too.';

    CREATE VIEW analytics.daily_events WITH (security_barrier) AS
    SELECT
        sums.account_id,
        sums.day,
        dim_event_types.event_type,
        sums.events,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM analytics.mv_daily_events AS sums
    JOIN warehouse.dim_event_types USING (event_type_key)
    WHERE sums.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'volume' AND report.state = 'served'
    ) AND ((SELECT caller.sees_all FROM warehouse.caller)
        OR sums.account_id = ANY (ARRAY(
            SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.daily_events IS
        'Events per account (* is all), day and type; days without such an event are no rows.';

    CREATE VIEW warehouse.last_day AS
    SELECT CASE WHEN (SELECT caller.sees_all FROM warehouse.caller)
        THEN (
            SELECT max(kept.day) FROM analytics.mv_daily_events AS kept
            WHERE kept.report_id = report.report_id AND kept.account_id = '*'
        )
        ELSE (
            SELECT max(kept.day)
            FROM warehouse.own_accounts AS own
            JOIN analytics.mv_daily_events AS kept
                ON kept.report_id = report.report_id AND kept.account_id = own.account_id
        )
        END AS day
    FROM spectrum.reports AS report
    WHERE report.kind = 'volume' AND report.state = 'served';
    COMMENT ON VIEW warehouse.last_day IS
        'The last day with an event that the caller sees: how far the calendars of views go.';
    PERFORM spectrum._create_event_days();
    PERFORM spectrum._add_kind('volume', 10, '_maintain_daily_events',
        '{analytics.mv_daily_events}', '{daily_events}');
    PERFORM spectrum._begin_report('volume');
END
$$;
COMMENT ON FUNCTION spectrum._create_daily_events() IS
    'Room 60: makes mv_daily_events and its plain view.';

CREATE FUNCTION spectrum._create_event_days()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW warehouse.waiting_days AS
    SELECT came.user_key, came.occurred_at, came.event_id,
        calendar.days[width_bucket(came.occurred_at, calendar.starts)] AS day
    FROM (
        SELECT min(news.first_at) AS first_at, max(news.last_at) + interval '1 us' AS end_at
        FROM spectrum.news
    ) AS held
    CROSS JOIN LATERAL analytics._calendar_days(held.first_at, held.end_at) AS calendar
    CROSS JOIN spectrum.news
    CROSS JOIN LATERAL unnest(news.user_keys, news.occurred_ats, news.event_ids)
        AS came (user_key, occurred_at, event_id);
    COMMENT ON VIEW warehouse.waiting_days IS
        'The facts that no refresh has counted yet, by their keys, and the days they are of.';

    CREATE VIEW analytics.event_days WITH (security_barrier) AS
    SELECT kept.account_id, kept.day, kept.event_type_key, kept.events
    FROM analytics.mv_daily_events AS kept
    WHERE kept.report_id = (
        SELECT report.report_id FROM spectrum.reports AS report
        WHERE report.kind = 'volume' AND report.state = 'served'
    ) AND (SELECT caller.sees_all FROM warehouse.caller) AND (kept.day >= (
        SELECT (settings.facts_from AT TIME ZONE settings.timezone)::date
        FROM analytics.settings
    )) IS NOT FALSE
    UNION ALL
    SELECT scopes.account_id, waiting.day, fact.event_type_key, 1
    FROM warehouse.waiting_days AS waiting
    CROSS JOIN LATERAL (
        SELECT known.account_key, known.event_type_key
        FROM warehouse.fact_events AS known
        WHERE known.user_key = waiting.user_key AND known.occurred_at = waiting.occurred_at
            AND known.event_id = waiting.event_id
        OFFSET 0
    ) AS fact
    JOIN warehouse.dim_accounts AS dim USING (account_key)
    CROSS JOIN LATERAL (VALUES ('*'), (nullif(dim.account_id, ''))) AS scopes (account_id)
    WHERE (SELECT caller.sees_all FROM warehouse.caller);
    COMMENT ON VIEW analytics.event_days IS
        'How many events of each account (* is all), day and type there are, to be summed up: the '
        'sums that are kept, and the events that no refresh has counted yet; without days whose '
        'facts are purged. Exact where user_days_state says so; empty for tenants.';
    COMMENT ON COLUMN analytics.event_days.day IS 'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.event_days.event_type_key IS 'As in analytics.events.';
    COMMENT ON COLUMN analytics.event_days.events IS 'Events, of the unknown user too.';
END
$$;
COMMENT ON FUNCTION spectrum._create_event_days() IS
    'Room 60: makes warehouse.waiting_days and analytics.event_days.';

CREATE FUNCTION analytics._maintain_daily_events(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    SELECT d.starts, d.days INTO v_starts, v_days FROM analytics._news_days() AS d;
    INSERT INTO analytics.mv_daily_events AS sums (
        report_id, account_id, day, event_type_key, events
    )
    SELECT p_report, scopes.account_id, v_days[counts.number], counts.event_type_key,
        sum(counts.events)
    FROM (
        SELECT news.scope, width_bucket(news.occurred_at, v_starts) AS number,
            news.event_type_key, sum(news.sign) AS events
        FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <= p_built_to
        GROUP BY 1, 2, 3
    ) AS counts
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, counts.number, counts.event_type_key
    HAVING sum(counts.events) <> 0
    ON CONFLICT (report_id, account_id, day, event_type_key) DO UPDATE SET
        events = sums.events + excluded.events;

    IF EXISTS (SELECT FROM pg_temp.spectrum_news WHERE sign < 0) THEN
        DELETE FROM analytics.mv_daily_events AS sums
        USING (SELECT DISTINCT account_id FROM pg_temp.spectrum_scopes) AS scopes
        WHERE sums.report_id = p_report AND sums.account_id = scopes.account_id
            AND sums.events = 0;
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._maintain_daily_events(integer, bigint) IS
    'Moves mv_daily_events by the news.';

CREATE FUNCTION analytics._standing_daily_events()
RETURNS TABLE (account_id text, day date, event_type text, events bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT scopes.account_id, t.period, t.breakdown, t.value::bigint
    FROM (
        SELECT '*' AS account_id, NULL AS account
        UNION ALL
        SELECT dim.account_id, dim.account_id FROM warehouse.dim_accounts AS dim
        WHERE dim.account_key <> 0
    ) AS scopes
    CROSS JOIN LATERAL analytics.trend(
        p_breakdown => 'event_type', p_account => scopes.account
    ) AS t
    WHERE t.value > 0;
END
$$;
COMMENT ON FUNCTION analytics._standing_daily_events() IS
    'What analytics.daily_events has to show, out of all events: for verify().';
