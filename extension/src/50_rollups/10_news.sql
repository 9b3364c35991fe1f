-- Room 50, news: what a refresh works on. It takes the notes of the batches and lays out, in
-- temporary tables that all reports read, which facts came (+) and went (-) and whom they concern.
--
-- Scope: for which accounts a user's events count. One number:
--   a > 0   all his events are of account a: they count for a and for all accounts together
--   0       for all accounts together only: he has events of several accounts, or of none
--   -a      his events of account a, for a only: beside scope 0
-- So a user of one account, as nearly all are, is looked at once, not twice. When an event of
-- another account is counted, what is kept of scope a is split into 0 and -a, which moves no sum:
-- for that, what is read in the facts for scope a must be of account a, whatever else is there
-- already and not counted yet. The unknown user is
-- no unit of any report; his events are in scope of their own account, for sums of events.

CREATE FUNCTION spectrum._clear_news()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_news',
        'sign integer, scope bigint, user_key bigint, account_key bigint, event_type_key integer, '
        'geo_key integer, occurred_at timestamptz, event_id uuid, properties jsonb, '
        'revenue numeric, currency text');
    PERFORM spectrum._empty_temporary('spectrum_scopes',
        'scope bigint, account_id text COLLATE "C", PRIMARY KEY (scope, account_id)');
END
$$;
COMMENT ON FUNCTION spectrum._clear_news() IS
    'Empties pg_temp.spectrum_news (facts that came: sign 1, went: -1, or both: 0, by scope) and '
    'pg_temp.spectrum_scopes (accounts that a scope counts for).';

CREATE FUNCTION spectrum._last_note(p_events bigint)
RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_last_no bigint := (
        SELECT max(waiting.note_no)
        FROM (
            SELECT news.note_no,
                sum(news.events) OVER (ORDER BY news.note_no) - news.events AS before
            FROM spectrum.news
        ) AS waiting
        WHERE waiting.before < p_events
    );
BEGIN
    IF v_last_no IS NULL OR NOT EXISTS (SELECT FROM spectrum.news WHERE note_no > v_last_no) THEN
        RETURN 9223372036854775807;
    END IF;
    RETURN v_last_no;
END
$$;
COMMENT ON FUNCTION spectrum._last_note(bigint) IS
    'The number up to which notes name about p_events facts; the highest where no more wait.';

CREATE FUNCTION spectrum._lay_out_news(p_last_no bigint, OUT taken bigint, OUT missing bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
AS $$
DECLARE
    -- What counts of those before is frozen, also where one is erased.
    v_facts_from timestamptz := spectrum._facts_from();
BEGIN
    -- One statement, so one snapshot: notes and facts that belong together are seen together.
    -- Nothing that an earlier one saw of the notes may limit it: a batch may commit in between.
    -- What an event was before is what its first note says was taken back; what it is now is the
    -- fact, or what a note that is still to come says was taken back.
    WITH notes AS (
        DELETE FROM spectrum.news WHERE note_no <= p_last_no
        RETURNING note_no, user_keys, occurred_ats, event_ids
    ),
    came AS MATERIALIZED (
        SELECT notes.note_no, came.user_key, came.occurred_at, came.event_id
        FROM notes
        CROSS JOIN LATERAL unnest(notes.user_keys, notes.occurred_ats, notes.event_ids)
            AS came (user_key, occurred_at, event_id)
        WHERE came.occurred_at >= v_facts_from
    ),
    went AS (DELETE FROM spectrum.withdrawals WHERE note_no <= p_last_no RETURNING *),
    was AS (
        SELECT DISTINCT ON (went.event_id, went.user_key, went.occurred_at) went.*
        FROM went
        WHERE went.occurred_at >= v_facts_from AND NOT EXISTS (
            SELECT FROM came
            WHERE (came.event_id, came.user_key, came.occurred_at)
                = (went.event_id, went.user_key, went.occurred_at) AND came.note_no < went.note_no
        )
        ORDER BY went.event_id, went.user_key, went.occurred_at, went.note_no
    ),
    still_to_come AS (
        SELECT DISTINCT ON (gone.event_id, gone.user_key, gone.occurred_at) gone.*
        FROM spectrum.withdrawals AS gone
        WHERE gone.note_no > p_last_no
        ORDER BY gone.event_id, gone.user_key, gone.occurred_at, gone.note_no
    ),
    stayed AS (
        SELECT DISTINCT came.user_key, came.occurred_at, came.event_id
        FROM came
        WHERE NOT EXISTS (
            SELECT FROM went
            WHERE (went.event_id, went.user_key, went.occurred_at)
                = (came.event_id, came.user_key, came.occurred_at) AND went.note_no > came.note_no
        )
    ),
    changes AS (
        SELECT -1 AS sign, was.* FROM was
        UNION ALL
        SELECT 1, 0, fact.*
        FROM stayed
        -- A subquery that names the row it looks up, so that this is a look-up in any plan.
        CROSS JOIN LATERAL (
            SELECT known.event_id, known.occurred_at, known.account_key, known.user_key,
                known.event_type_key, known.geo_key, known.properties, known.revenue, known.currency
            FROM warehouse.fact_events AS known
            WHERE known.user_key = stayed.user_key AND known.occurred_at = stayed.occurred_at
                AND known.event_id = stayed.event_id
            OFFSET 0
        ) AS fact
        WHERE NOT EXISTS (
            SELECT FROM still_to_come AS gone
            WHERE (gone.event_id, gone.user_key, gone.occurred_at)
                = (stayed.event_id, stayed.user_key, stayed.occurred_at)
        )
        UNION ALL
        SELECT 1, gone.* FROM still_to_come AS gone JOIN stayed
            USING (event_id, user_key, occurred_at)
        UNION ALL
        -- Came and went again: no sum moves, but who reads facts may have met it in between.
        SELECT 0, went.* FROM went JOIN came USING (event_id, user_key, occurred_at)
        WHERE came.note_no < went.note_no
    ), laid_out AS (
        INSERT INTO pg_temp.spectrum_news (sign, scope, user_key, account_key, event_type_key,
            geo_key, occurred_at, event_id, properties, revenue, currency)
        SELECT sign, account_key, user_key, account_key, event_type_key, geo_key, occurred_at,
            event_id, properties, revenue, currency
        FROM changes
        RETURNING sign
    )
    SELECT (SELECT count(*) FROM laid_out),
        (SELECT count(*) FROM stayed) - (SELECT count(*) FROM laid_out WHERE sign = 1)
    INTO taken, missing;
END
$$;
COMMENT ON FUNCTION spectrum._lay_out_news(bigint) IS
    'Takes the notes up to a number and lays out in pg_temp.spectrum_news what they changed, net: '
    'facts that count from now on (1), facts as they counted before (-1), and facts that came and '
    'went again (0). Returns how many, and how many facts it did not find.';

CREATE FUNCTION spectrum._hear_of_months()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_month regclass;
BEGIN
    FOR v_month IN
        SELECT link.inhrelid FROM pg_inherits AS link
        WHERE link.inhparent = 'warehouse.fact_events'::regclass
        ORDER BY link.inhrelid
    LOOP
        EXECUTE format('LOCK TABLE ONLY %s IN ACCESS SHARE MODE', v_month);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._hear_of_months() IS
    'Has the plans of this transaction know every month. A session hears of what others attached '
    'when it takes a lock that it does not hold yet, and of a new month it holds none.';

CREATE FUNCTION spectrum._take_news(p_last_no bigint)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_news record;
BEGIN
    -- A statement is planned before its snapshot is taken: a month that a batch attached in
    -- between is not in the plan, while the notes of its facts are seen. Planned again it is.
    FOR v_try IN 1 .. 3 LOOP
        BEGIN
            r_news := spectrum._lay_out_news(p_last_no);
            -- What is missing in the end was deleted by hand.
            EXIT WHEN r_news.missing = 0 OR v_try = 3;
            RAISE EXCEPTION 'facts that the news name were not found'
                USING ERRCODE = 'triggered_data_change_violation';
        EXCEPTION
            WHEN triggered_data_change_violation THEN
                PERFORM spectrum._hear_of_months();
        END;
    END LOOP;
    IF r_news.missing > 0 THEN
        RAISE WARNING 'spectrum: % facts were deleted by hand before they were counted',
            r_news.missing;
    END IF;
    RETURN r_news.taken;
END
$$;
COMMENT ON FUNCTION spectrum._take_news(bigint) IS
    'Takes the notes up to a number, with all facts that they name. Returns how many changes.';

CREATE FUNCTION spectrum._add_history(p_after bigint, p_until bigint)
RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_facts_from timestamptz := spectrum._facts_from();
    v_added bigint;
BEGIN
    -- Again one statement: facts that a note still to come will bring are left out, those that
    -- one will take back are put in.
    WITH still_to_come AS MATERIALIZED (
        SELECT news.note_no, came.user_key, came.occurred_at, came.event_id
        FROM spectrum.news
        CROSS JOIN LATERAL unnest(news.user_keys, news.occurred_ats, news.event_ids)
            AS came (user_key, occurred_at, event_id)
        WHERE came.user_key > p_after AND came.user_key <= p_until
    ),
    history AS (
        SELECT fact.user_key, fact.account_key, fact.event_type_key, fact.geo_key,
            fact.occurred_at, fact.event_id, fact.properties, fact.revenue, fact.currency
        FROM warehouse.fact_events AS fact
        WHERE fact.user_key > p_after AND fact.user_key <= p_until
            AND fact.occurred_at >= v_facts_from
            AND NOT EXISTS (
                SELECT FROM still_to_come AS came
                WHERE came.event_id = fact.event_id AND came.user_key = fact.user_key
                    AND came.occurred_at = fact.occurred_at
            )
        UNION ALL
        SELECT gone.user_key, gone.account_key, gone.event_type_key, gone.geo_key,
            gone.occurred_at, gone.event_id, gone.properties, gone.revenue, gone.currency
        FROM (
            SELECT DISTINCT ON (event_id, user_key, occurred_at) withdrawals.*
            FROM spectrum.withdrawals
            WHERE user_key > p_after AND user_key <= p_until
            ORDER BY event_id, user_key, occurred_at, note_no
        ) AS gone
        WHERE NOT EXISTS (
            SELECT FROM still_to_come AS came
            WHERE came.event_id = gone.event_id AND came.user_key = gone.user_key
                AND came.occurred_at = gone.occurred_at AND came.note_no < gone.note_no
        )
    )
    INSERT INTO pg_temp.spectrum_news (
        sign, scope, user_key, account_key, event_type_key, geo_key, occurred_at, event_id,
        properties, revenue, currency
    )
    SELECT 1, account_key, user_key, account_key, event_type_key, geo_key, occurred_at, event_id,
        properties, revenue, currency
    FROM history;
    GET DIAGNOSTICS v_added = ROW_COUNT;
    RETURN v_added;
END
$$;
COMMENT ON FUNCTION spectrum._add_history(bigint, bigint) IS
    'Lays out in pg_temp.spectrum_news, as if it came now, all that counts so far, and was not '
    'purged, of the users with keys in (p_after, p_until]. Returns how many facts.';

CREATE FUNCTION spectrum._split_scopes(p_users bigint[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_table record;
BEGIN
    FOR r_table IN
        SELECT held.name, unit.attname AS unit, array_agg(report.report_id) AS report_ids,
            (
                SELECT string_agg(CASE shown.attname WHEN 'scope' THEN 'scopes.scope'
                    ELSE 'had.' || quote_ident(shown.attname) END, ', ' ORDER BY shown.attnum)
                FROM pg_attribute AS shown
                WHERE shown.attrelid = held.name::regclass AND shown.attnum > 0
                    AND NOT shown.attisdropped
            ) AS columns
        FROM spectrum.reports AS report
        JOIN spectrum.report_kinds AS kind USING (kind)
        CROSS JOIN LATERAL unnest(kind.tables) AS held (name)
        JOIN pg_attribute AS scope
            ON scope.attrelid = held.name::regclass AND scope.attname = 'scope'
        JOIN pg_attribute AS unit
            ON unit.attrelid = held.name::regclass AND unit.attname IN ('user_key', 'unit')
        WHERE report.state <> 'discarded'
            -- Accounts are no users.
            AND report.definition ->> 'unit' IS DISTINCT FROM 'account'
        GROUP BY held.name, unit.attname
    LOOP
        EXECUTE format(
            'WITH had AS (DELETE FROM %1$s AS had USING warehouse.dim_users AS dim '
            'WHERE had.report_id = ANY ($1) AND had.%2$I = ANY ($2) '
            'AND dim.user_key = had.%2$I AND had.scope = dim.account_key RETURNING had.*) '
            'INSERT INTO %1$s SELECT %3$s FROM had '
            'CROSS JOIN LATERAL (VALUES (0), (-had.scope)) AS scopes (scope)',
            r_table.name, r_table.unit, r_table.columns)
        USING r_table.report_ids, p_users;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._split_scopes(bigint[]) IS
    'Users of one account who become users of several: what reports keep of them in the scope of '
    'that account is kept in two from now on. No sum moves, and no fact is read.';

CREATE FUNCTION spectrum._scope_shared_users()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO pg_temp.spectrum_news (
        sign, scope, user_key, account_key, event_type_key, geo_key, occurred_at, event_id,
        properties, revenue, currency
    )
    SELECT news.sign, -news.account_key, news.user_key, news.account_key,
        news.event_type_key, news.geo_key, news.occurred_at, news.event_id, news.properties,
        news.revenue, news.currency
    FROM pg_temp.spectrum_news AS news
    JOIN spectrum.shared_users USING (user_key)
    WHERE news.account_key <> 0;

    UPDATE pg_temp.spectrum_news AS news SET scope = 0
    FROM spectrum.shared_users
    WHERE shared_users.user_key = news.user_key AND news.scope > 0;
END
$$;
COMMENT ON FUNCTION spectrum._scope_shared_users() IS
    'Puts the news of users with several accounts into both of their scopes.';

CREATE FUNCTION spectrum._scope_news()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_newly_shared bigint[];
BEGIN
    WITH newly_shared AS (
        INSERT INTO spectrum.shared_users (user_key)
        SELECT DISTINCT news.user_key
        FROM pg_temp.spectrum_news AS news
        JOIN warehouse.dim_users AS dim USING (user_key)
        WHERE news.user_key <> 0 AND news.account_key <> dim.account_key
        ORDER BY news.user_key
        ON CONFLICT (user_key) DO NOTHING
        RETURNING shared_users.user_key
    )
    -- Who had no account so far was in scope 0 already, with nothing that counts for one.
    SELECT array_agg(newly_shared.user_key) INTO v_newly_shared
    FROM newly_shared
    JOIN warehouse.dim_users AS dim USING (user_key)
    WHERE dim.account_key <> 0;

    IF v_newly_shared IS NOT NULL THEN
        PERFORM spectrum._split_scopes(v_newly_shared);
    END IF;
    IF EXISTS (SELECT FROM spectrum.shared_users) THEN
        PERFORM spectrum._scope_shared_users();
    END IF;

    INSERT INTO pg_temp.spectrum_scopes (scope, account_id)
    SELECT 0, '*'
    UNION ALL
    SELECT scopes.scope, scopes.account_id
    FROM (
        SELECT news.account_key FROM pg_temp.spectrum_news AS news
        UNION
        SELECT news.scope FROM pg_temp.spectrum_news AS news WHERE news.scope > 0
    ) AS accounts
    JOIN warehouse.dim_accounts AS dim USING (account_key)
    CROSS JOIN LATERAL (
        VALUES (dim.account_key, '*'), (dim.account_key, dim.account_id),
            (-dim.account_key, dim.account_id)
    ) AS scopes (scope, account_id)
    WHERE accounts.account_key <> 0;
END
$$;
COMMENT ON FUNCTION spectrum._scope_news() IS
    'Gives the news their scopes, and pg_temp.spectrum_scopes the accounts that each scope counts '
    'for. What is kept of a user met in a second account is split from one scope to two.';

CREATE FUNCTION spectrum._add_arrays(p_left bigint[], p_right bigint[])
RETURNS bigint[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_agg(coalesce(pair.a, 0) + coalesce(pair.b, 0) ORDER BY pair.number)
    FROM unnest(p_left, p_right) WITH ORDINALITY AS pair (a, b, number)
$$;
COMMENT ON FUNCTION spectrum._add_arrays(bigint[], bigint[]) IS
    'Adds two arrays element by element; what one lacks is 0.';
