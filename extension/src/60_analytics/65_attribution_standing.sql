-- Room 60, standing attribution: the user's own definitions, and what each day's conversions are
-- given to. Of each conversion it keeps what it is given to. That is found in the sessions that
-- kind sessions keeps, and found again where one of these comes, goes or changes, for conversions
-- up to 31 days after its start: as long as a touch counts, and the longest session.

CREATE FUNCTION spectrum._create_attributions()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.attributions') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.attributions (
        attribution text NOT NULL CONSTRAINT attributions_pkey PRIMARY KEY,
        conversion jsonb NOT NULL,
        model text NOT NULL
            CONSTRAINT attributions_model_is_known CHECK (model IN ('last', 'first')),
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE spectrum.attributions IS
        'The conversions that analytics.attributed_conversions shows. Define one with '
        'spectrum.define_attribution().';
    COMMENT ON COLUMN spectrum.attributions.attribution IS 'Name.';
    COMMENT ON COLUMN spectrum.attributions.conversion IS
        'The event that converts: "event type" or {"event": "event type", "where": {...}}.';
    COMMENT ON COLUMN spectrum.attributions.model IS 'Which touch it is given to: last or first.';
    COMMENT ON COLUMN spectrum.attributions.changed_at IS 'When it was last defined.';

    CREATE TABLE spectrum.rollup_conversions (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        scope bigint NOT NULL,
        occurred_at timestamptz NOT NULL,
        event_id uuid NOT NULL,
        revenue numeric,
        currency text,
        credit text[] NOT NULL,
        CONSTRAINT rollup_conversions_pkey
        PRIMARY KEY (report_id, user_key, scope, occurred_at, event_id)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE spectrum.rollup_conversions IS
        'The conversions of each user, and what they are given to.';
    COMMENT ON COLUMN spectrum.rollup_conversions.report_id IS
        'spectrum.reports, kind attribution.';
    COMMENT ON COLUMN spectrum.rollup_conversions.user_key IS 'dim_users; never the unknown user.';
    COMMENT ON COLUMN spectrum.rollup_conversions.scope IS 'See rollup_user_days.scope.';
    COMMENT ON COLUMN spectrum.rollup_conversions.currency IS 'NULL where there is no money.';
    COMMENT ON COLUMN spectrum.rollup_conversions.credit IS
        'Channel, source, medium and campaign of the touch; direct where there is none.';

    CREATE TABLE analytics.mv_attributed_conversions (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        day date NOT NULL,
        credit_key bytea NOT NULL,
        channel text NOT NULL,
        source text,
        medium text,
        campaign text,
        currency text,
        conversions bigint NOT NULL,
        users bigint NOT NULL,
        revenue numeric NOT NULL,
        CONSTRAINT mv_attributed_conversions_pkey
        PRIMARY KEY (report_id, account_id, day, credit_key)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_attributed_conversions IS
        'What each day''s conversions are given to, per account and for all accounts together '
        '(account_id *), kept by refreshes. Read it through analytics.attributed_conversions.';
    COMMENT ON COLUMN analytics.mv_attributed_conversions.report_id IS
        'spectrum.reports, kind attribution.';
    COMMENT ON COLUMN analytics.mv_attributed_conversions.day IS
        'Calendar day in config.timezone.';
    COMMENT ON COLUMN analytics.mv_attributed_conversions.credit_key IS
        'What stands for channel, source, medium, campaign and currency in the key: 16 bytes of '
        'their SHA-256. They may be longer than an index can hold.';
    PERFORM spectrum._create_attribution_view();
    PERFORM spectrum._add_kind('attribution', 72, '_maintain_attribution',
        '{spectrum.rollup_conversions, analytics.mv_attributed_conversions}',
        '{attributed_conversions}');
END
$$;
COMMENT ON FUNCTION spectrum._create_attributions() IS
    'Room 60: makes spectrum.attributions, the tables of the standing attribution and its plain '
    'view.';

CREATE FUNCTION spectrum._create_attribution_view()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CREATE VIEW analytics.attributed_conversions WITH (security_barrier) AS
    SELECT
        sums.account_id,
        report.name AS attribution,
        sums.day,
        sums.channel,
        sums.source,
        sums.medium,
        sums.campaign,
        sums.currency,
        sums.conversions,
        sums.users,
        CASE WHEN sums.currency IS NOT NULL THEN trim_scale(sums.revenue) END AS revenue,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_attributed_conversions AS sums USING (report_id)
    WHERE report.kind = 'attribution' AND report.state = 'served'
        AND ((SELECT caller.sees_all FROM warehouse.caller)
            OR sums.account_id = ANY (ARRAY(
                SELECT own.account_id FROM warehouse.own_accounts AS own)));
    COMMENT ON VIEW analytics.attributed_conversions IS
        'What brought each day''s conversions, by account (account_id *: all accounts) and defined '
        'attribution, as analytics.attribution says of the day.';
    COMMENT ON COLUMN analytics.attributed_conversions.attribution IS
        'Name in spectrum.attributions.';
    COMMENT ON COLUMN analytics.attributed_conversions.channel IS 'direct: no touch.';
    COMMENT ON COLUMN analytics.attributed_conversions.source IS
        'utm_source, or the host of the referrer where there are no UTM tags.';
    COMMENT ON COLUMN analytics.attributed_conversions.currency IS
        'Of revenue; NULL: conversions without money.';
    COMMENT ON COLUMN analytics.attributed_conversions.users IS
        'Distinct users of these conversions.';
END
$$;
COMMENT ON FUNCTION spectrum._create_attribution_view() IS
    'Room 60: makes the view analytics.attributed_conversions.';

CREATE FUNCTION spectrum.define_attribution(
    p_name text,
    p_conversion jsonb,
    p_model text DEFAULT 'last'
)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM analytics._check_attribution(p_conversion, p_model);
    -- First of all: who defines the name meanwhile is waited for, and replaced.
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.attributions WHERE attribution = p_name;
    INSERT INTO spectrum.attributions (attribution, conversion, model)
    VALUES (p_name, p_conversion, p_model);
    PERFORM spectrum._begin_report('attribution', p_name, to_jsonb(definition))
    FROM spectrum.attributions AS definition WHERE attribution = p_name;
END
$$;
COMMENT ON FUNCTION spectrum.define_attribution(text, jsonb, text) IS
    'Defines a standing attribution or replaces it: p_conversion and p_model are those of '
    'analytics.attribution. The next refresh shows it in analytics.attributed_conversions.';

CREATE FUNCTION spectrum.drop_attribution(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.attributions WHERE attribution = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a name in spectrum.attributions');
    END IF;
    PERFORM spectrum._discard_reports('attribution', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_attribution(text) IS
    'Removes a standing attribution.';

CREATE FUNCTION analytics._kept_credit(
    p_model text,
    p_sessions integer,
    p_user bigint,
    p_scope bigint,
    p_at timestamptz
)
RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_started_at timestamptz := (
        SELECT known.session_start FROM spectrum.rollup_sessions AS known
        WHERE known.report_id = p_sessions AND known.user_key = p_user AND known.scope = p_scope
            AND known.session_start <= p_at
        ORDER BY known.session_start DESC
        LIMIT 1
    );
BEGIN
    RETURN analytics._credit((
        SELECT ARRAY[near.utm_source, near.utm_medium, near.utm_campaign, near.referrer]
        FROM spectrum.rollup_sessions AS near
        WHERE near.report_id = p_sessions AND near.user_key = p_user AND near.scope = p_scope
            AND near.session_start >= v_started_at - interval '720 hours'
            AND near.session_start <= v_started_at
            AND near.channel <> 'direct'
        ORDER BY CASE WHEN p_model = 'first' THEN near.session_start END, near.session_start DESC
        LIMIT 1
    ));
END
$$;
COMMENT ON FUNCTION analytics._kept_credit(text, integer, bigint, bigint, timestamptz) IS
    'What a conversion at p_at is given to, by the sessions that are kept.';

CREATE FUNCTION analytics._find_conversions(
    p_report integer,
    p_built_to bigint,
    p_event_key integer,
    p_filter jsonb,
    p_model text
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_sessions integer := analytics._kept_by('sessions');
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_conversions',
        'user_key bigint, scope bigint, occurred_at timestamptz, event_id uuid, revenue numeric, '
        'currency text, old_credit text[], credit text[]');
    WITH went AS (
        DELETE FROM spectrum.rollup_conversions AS known
        USING pg_temp.spectrum_news AS news
        WHERE news.sign < 0 AND known.report_id = p_report
            AND known.user_key = news.user_key AND known.scope = news.scope
            AND known.occurred_at = news.occurred_at AND known.event_id = news.event_id
        RETURNING known.*
    )
    INSERT INTO pg_temp.spectrum_conversions
    SELECT went.user_key, went.scope, went.occurred_at, went.event_id, went.revenue,
        went.currency, went.credit, NULL
    FROM went;
    IF NOT analytics._is_build(p_report, p_built_to) THEN
        INSERT INTO pg_temp.spectrum_conversions
        SELECT known.user_key, known.scope, known.occurred_at, known.event_id, known.revenue,
            known.currency, known.credit, found.credit
        FROM (
            SELECT DISTINCT near.*
            FROM pg_temp.spectrum_session_changes AS changed
            CROSS JOIN LATERAL (
                SELECT kept.* FROM spectrum.rollup_conversions AS kept
                WHERE kept.report_id = p_report AND kept.user_key = changed.user_key
                    AND kept.scope = changed.scope AND kept.occurred_at >= changed.session_start
                    AND kept.occurred_at <= changed.session_start + interval '744 hours'
                OFFSET 0
            ) AS near
        ) AS known
        CROSS JOIN LATERAL analytics._kept_credit(
            p_model, v_sessions, known.user_key, known.scope, known.occurred_at
        ) AS found (credit)
        WHERE found.credit <> known.credit;
    END IF;
    INSERT INTO pg_temp.spectrum_conversions
    SELECT news.user_key, news.scope, news.occurred_at, news.event_id, news.revenue,
        CASE WHEN news.revenue IS NOT NULL THEN news.currency END,
        NULL, analytics._kept_credit(
            p_model, v_sessions, news.user_key, news.scope, news.occurred_at
        )
    FROM pg_temp.spectrum_news AS news
    WHERE news.sign > 0 AND news.user_key <> 0 AND news.user_key <= p_built_to
        AND news.event_type_key = p_event_key
        AND (p_filter IS NULL OR news.properties @> p_filter);
END
$$;
COMMENT ON FUNCTION analytics._find_conversions(integer, bigint, integer, jsonb, text) IS
    'Takes the conversions that went out of rollup_conversions, and leaves in '
    'pg_temp.spectrum_conversions these (credit NULL), those that are given to something else than '
    'before, and those that came (old_credit NULL).';

CREATE FUNCTION analytics._move_conversion_sums(p_report integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_starts timestamptz[];
    v_days date[];
BEGIN
    SELECT spectrum.period_starts(
        'day', min(changed.occurred_at), max(changed.occurred_at) + interval '1 us'
    ) INTO v_starts
    FROM pg_temp.spectrum_conversions AS changed;
    v_days := spectrum.period_dates(v_starts);

    INSERT INTO analytics.mv_attributed_conversions AS sums (
        report_id, account_id, day, credit_key, channel, source, medium, campaign, currency,
        conversions, users, revenue
    )
    SELECT p_report, scopes.account_id, v_days[moved.number], substring(
            sha256(convert_to(array_append(moved.credit, moved.currency)::text, 'UTF8')) FOR 16
        ),
        moved.credit[1], moved.credit[2], moved.credit[3], moved.credit[4], moved.currency,
        sum(moved.conversions),
        sum((now.conversions > 0)::integer - (now.conversions > moved.conversions)::integer),
        coalesce(sum(moved.revenue), 0)
    FROM (
        SELECT version.user_key, version.scope, version.number, version.credit, version.currency,
            sum(version.sign) AS conversions, sum(version.sign * version.revenue) AS revenue
        FROM (
            SELECT version.sign, changed.user_key, changed.scope, version.credit, changed.currency,
                changed.revenue, width_bucket(changed.occurred_at, v_starts) AS number
            FROM pg_temp.spectrum_conversions AS changed
            CROSS JOIN LATERAL (
                VALUES (-1, changed.old_credit), (1, changed.credit)
            ) AS version (sign, credit)
            WHERE version.credit IS NOT NULL
        ) AS version
        GROUP BY 1, 2, 3, 4, 5
    ) AS moved
    CROSS JOIN LATERAL (
        SELECT count(*) AS conversions FROM spectrum.rollup_conversions AS kept
        WHERE kept.report_id = p_report AND kept.user_key = moved.user_key
            AND kept.scope = moved.scope AND kept.occurred_at >= v_starts[moved.number]
            AND kept.occurred_at < v_starts[moved.number + 1] AND kept.credit = moved.credit
            AND kept.currency IS NOT DISTINCT FROM moved.currency
        OFFSET 0
    ) AS now
    JOIN pg_temp.spectrum_scopes AS scopes USING (scope)
    GROUP BY scopes.account_id, moved.number, moved.credit, moved.currency
    ON CONFLICT (report_id, account_id, day, credit_key) DO UPDATE SET
        conversions = sums.conversions + excluded.conversions,
        users = sums.users + excluded.users,
        revenue = sums.revenue + excluded.revenue;
    IF EXISTS (SELECT FROM pg_temp.spectrum_conversions WHERE old_credit IS NOT NULL) THEN
        DELETE FROM analytics.mv_attributed_conversions AS sums
        WHERE sums.report_id = p_report AND sums.conversions = 0 AND sums.day = ANY (v_days)
            AND sums.account_id = ANY (ARRAY(SELECT account_id FROM pg_temp.spectrum_scopes));
    END IF;
END
$$;
COMMENT ON FUNCTION analytics._move_conversion_sums(integer) IS
    'Moves mv_attributed_conversions by the conversions found.';

CREATE FUNCTION analytics._maintain_attribution(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    PERFORM analytics._find_conversions(
        p_report, p_built_to, analytics._event_key(wanted.event_type), wanted.filter,
        report.definition ->> 'model'
    )
    FROM spectrum.reports AS report
    CROSS JOIN LATERAL analytics._read_steps(
        'p_conversion', jsonb_build_array(report.definition -> 'conversion')
    ) AS wanted
    WHERE report.report_id = p_report;
    IF NOT EXISTS (SELECT FROM pg_temp.spectrum_conversions) THEN
        RETURN;
    END IF;
    INSERT INTO spectrum.rollup_conversions
    SELECT p_report, come.user_key, come.scope, come.occurred_at, come.event_id, come.revenue,
        come.currency, come.credit
    FROM pg_temp.spectrum_conversions AS come
    WHERE come.old_credit IS NULL;
    UPDATE spectrum.rollup_conversions AS known SET credit = moved.credit
    FROM pg_temp.spectrum_conversions AS moved
    WHERE moved.credit IS NOT NULL AND moved.old_credit IS NOT NULL
        AND known.report_id = p_report AND known.user_key = moved.user_key
        AND known.scope = moved.scope AND known.occurred_at = moved.occurred_at
        AND known.event_id = moved.event_id;
    PERFORM analytics._move_conversion_sums(p_report);
END
$$;
COMMENT ON FUNCTION analytics._maintain_attribution(integer, bigint) IS
    'Moves the conversions and the sums of an attribution by the news and by the sessions that '
    'these changed.';

CREATE FUNCTION analytics._standing_attributed_conversions()
RETURNS TABLE (
    account_id text, attribution text, day date, channel text, source text, medium text,
    campaign text, currency text, conversions bigint, users bigint, revenue numeric
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_starts timestamptz[] := (
        SELECT h.starts FROM analytics._history_periods('day', NULL, NULL) AS h
    );
    v_days date[] := spectrum.period_dates(v_starts);
BEGIN
    RETURN QUERY
    SELECT a.account_id, report.name, v_days[width_bucket(a.occurred_at, v_starts)], a.credit[1],
        a.credit[2], a.credit[3], a.credit[4], a.currency, count(*), count(DISTINCT a.user_key),
        trim_scale(sum(a.revenue))
    FROM spectrum.reports AS report
    CROSS JOIN (VALUES (false), (true)) AS scopes (by_account)
    CROSS JOIN LATERAL analytics._attributed(
        report.definition -> 'conversion', NULL, NULL, report.definition ->> 'model', NULL,
        scopes.by_account, NULL
    ) AS a
    WHERE report.kind = 'attribution' AND report.state = 'served'
    GROUP BY a.account_id, report.name, 3, a.credit, a.currency;
END
$$;
COMMENT ON FUNCTION analytics._standing_attributed_conversions() IS
    'What analytics.attributed_conversions has to show, out of all events: for verify().';
