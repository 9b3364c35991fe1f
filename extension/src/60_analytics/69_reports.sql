-- Room 60, reports: the user's own questions as standing views. A question is a name and a function
-- that says, for some users, what each of them contributes to which cell. A refresh calls it for
-- the users that the news concern, takes out what they contributed before and puts in what they
-- contribute now. It reads these users whole: that is the price for not having to say more.

CREATE FUNCTION spectrum._create_own_reports()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.report_definitions') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.report_definitions (
        report text NOT NULL CONSTRAINT report_definitions_pkey PRIMARY KEY,
        contributions text NOT NULL,
        changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        error_msg text
    );
    COMMENT ON TABLE spectrum.report_definitions IS
        'The user''s own questions that analytics.reports shows. Define one with '
        'spectrum.define_report().';
    COMMENT ON COLUMN spectrum.report_definitions.report IS 'Name.';
    COMMENT ON COLUMN spectrum.report_definitions.contributions IS
        'The function that says what users contribute.';
    COMMENT ON COLUMN spectrum.report_definitions.changed_at IS 'When it was last defined.';
    COMMENT ON COLUMN spectrum.report_definitions.error_msg IS
        'What the function failed with: the report was given up, until it is defined again.';

    CREATE TABLE spectrum.rollup_contributions (
        report_id integer NOT NULL,
        user_key bigint NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        cell text[] COLLATE "C" NOT NULL,
        amount numeric NOT NULL
            CONSTRAINT rollup_contributions_amount_is_finite
            CHECK (amount > '-infinity' AND amount < 'infinity'),
        CONSTRAINT rollup_contributions_pkey PRIMARY KEY (report_id, user_key, account_id, cell)
    );
    COMMENT ON TABLE spectrum.rollup_contributions IS
        'What each user contributes to the user''s own reports.';
    COMMENT ON COLUMN spectrum.rollup_contributions.report_id IS 'spectrum.reports, kind custom.';
    COMMENT ON COLUMN spectrum.rollup_contributions.account_id IS 'As the function says; * is all.';
    COMMENT ON COLUMN spectrum.rollup_contributions.cell IS 'As the function says.';
    COMMENT ON COLUMN spectrum.rollup_contributions.amount IS 'Sum of what the function says.';

    CREATE TABLE analytics.mv_reports (
        report_id integer NOT NULL,
        account_id text COLLATE "C" NOT NULL,
        cell text[] COLLATE "C" NOT NULL,
        users bigint NOT NULL,
        amount numeric NOT NULL,
        CONSTRAINT mv_reports_pkey PRIMARY KEY (report_id, account_id, cell)
    ) WITH (fillfactor = 80);
    COMMENT ON TABLE analytics.mv_reports IS
        'Cells of the user''s own reports, kept by refreshes. Read it through analytics.reports.';
    COMMENT ON COLUMN analytics.mv_reports.report_id IS 'spectrum.reports, kind custom.';
    COMMENT ON COLUMN analytics.mv_reports.users IS 'Users who contribute.';
    COMMENT ON COLUMN analytics.mv_reports.amount IS 'Sum of what they contribute.';

    CREATE VIEW analytics.reports AS
    SELECT
        sums.account_id,
        report.name AS report,
        sums.cell,
        sums.users,
        trim_scale(sums.amount) AS amount,
        (SELECT watermark.as_of FROM spectrum.watermark) AS as_of
    FROM spectrum.reports AS report
    JOIN analytics.mv_reports AS sums USING (report_id)
    WHERE report.kind = 'custom' AND report.state = 'served';
    COMMENT ON VIEW analytics.reports IS
        'The user''s own reports, by account as their functions say (account_id *: all accounts).';
    COMMENT ON COLUMN analytics.reports.report IS 'Name in spectrum.report_definitions.';
    COMMENT ON COLUMN analytics.reports.cell IS 'What is counted, as the function says.';
    COMMENT ON COLUMN analytics.reports.users IS 'Users who contribute.';
    COMMENT ON COLUMN analytics.reports.amount IS 'Sum of what they contribute.';
    PERFORM spectrum._add_kind('custom', 90, '_maintain_own_report',
        '{spectrum.rollup_contributions, analytics.mv_reports}', '{reports}');
END
$$;
COMMENT ON FUNCTION spectrum._create_own_reports() IS
    'Room 60: makes report_definitions, rollup_contributions, mv_reports and its plain view.';

CREATE FUNCTION spectrum._check_contributions(p_function text)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_proc AS routine
        JOIN pg_class AS kept ON kept.oid = 'spectrum.report_definitions'::regclass
        WHERE routine.oid = to_regproc(p_function)
            AND routine.prokind = 'f' AND routine.provolatile IN ('s', 'i')
            AND pg_get_function_identity_arguments(routine.oid) = 'p_users bigint[]'
            AND pg_get_function_result(routine.oid)
                = 'TABLE(account_id text, user_key bigint, cell text[], amount numeric)'
            -- It runs with the rights of who refreshes: nobody else may be able to replace it.
            AND pg_has_role(routine.proowner, kept.relowner, 'MEMBER')
    ) THEN
        PERFORM spectrum._reject('p_contributions', p_function,
            'a STABLE function (p_users bigint[]) RETURNS TABLE (account_id text, user_key bigint, '
            'cell text[], amount numeric) that belongs to the owner of Spectrum''s tables');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_contributions(text) IS
    'Raises 22023 unless it is a function that says what users contribute.';

CREATE FUNCTION spectrum.define_report(p_name text, p_contributions regproc)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._check_name('p_name', p_name);
    PERFORM spectrum._check_contributions(p_contributions::text);
    -- First of all: a refresh that gives the report up notes so in its definition.
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.report_definitions WHERE report = p_name;
    INSERT INTO spectrum.report_definitions (report, contributions)
    VALUES (p_name, p_contributions::text);
    PERFORM spectrum._begin_report(
        'custom', p_name, jsonb_build_object('contributions', p_contributions::text)
    );
END
$$;
COMMENT ON FUNCTION spectrum.define_report(text, regproc) IS
    'Defines a report of the user''s own or replaces it; define it again too where its function '
    'changed. The function (p_users bigint[]) says for these users (user_key), from all their '
    'events in analytics.events, who contributes how much to which cell of which account '
    '(account_id; * is all). The next refresh shows the sums in analytics.reports.';

CREATE FUNCTION spectrum.drop_report(p_name text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM spectrum._hold_reports();
    DELETE FROM spectrum.report_definitions WHERE report = p_name;
    IF NOT FOUND THEN
        PERFORM spectrum._reject('p_name', p_name, 'a report in spectrum.report_definitions');
    END IF;
    PERFORM spectrum._discard_reports('custom', p_name);
END
$$;
COMMENT ON FUNCTION spectrum.drop_report(text) IS
    'Removes a report of the user''s own; the next refresh removes its rows. The function stays.';

CREATE FUNCTION analytics._own_contributions(p_function text, p_users bigint[])
RETURNS TABLE (account_id text, user_key bigint, cell text[], amount numeric)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT said.account_id, said.user_key, said.cell, sum(said.amount) '
        'FROM %s($1) AS said WHERE said.user_key = ANY ($1) GROUP BY 1, 2, 3',
        to_regproc(p_function))
    USING p_users;
END
$$;
COMMENT ON FUNCTION analytics._own_contributions(text, bigint[]) IS
    'What a user''s own function says about these users, and about nobody else.';

CREATE FUNCTION analytics._replace_contributions(
    p_report integer,
    p_function text,
    p_users bigint[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_contributions',
        'sign integer, user_key bigint, account_id text, cell text[], amount numeric');
    WITH removed AS (
        DELETE FROM spectrum.rollup_contributions AS known
        WHERE known.report_id = p_report AND known.user_key = ANY (p_users)
        RETURNING known.user_key, known.account_id, known.cell, known.amount
    )
    INSERT INTO pg_temp.spectrum_contributions (sign, user_key, account_id, cell, amount)
    SELECT -1, removed.* FROM removed;
    WITH added AS (
        INSERT INTO spectrum.rollup_contributions (report_id, user_key, account_id, cell, amount)
        SELECT p_report, said.user_key, said.account_id, said.cell, said.amount
        FROM analytics._own_contributions(p_function, p_users) AS said
        RETURNING user_key, account_id, cell, amount
    )
    INSERT INTO pg_temp.spectrum_contributions (sign, user_key, account_id, cell, amount)
    SELECT 1, added.* FROM added;

    INSERT INTO analytics.mv_reports AS sums (report_id, account_id, cell, users, amount)
    SELECT p_report, moved.account_id, moved.cell, sum(moved.sign), sum(moved.sign * moved.amount)
    FROM pg_temp.spectrum_contributions AS moved
    GROUP BY moved.account_id, moved.cell
    HAVING sum(moved.sign) <> 0 OR sum(moved.sign * moved.amount) <> 0
    ON CONFLICT (report_id, account_id, cell) DO UPDATE SET
        users = sums.users + excluded.users,
        amount = sums.amount + excluded.amount;
    DELETE FROM analytics.mv_reports AS sums
    USING (
        SELECT DISTINCT account_id, cell FROM pg_temp.spectrum_contributions WHERE sign < 0
    ) AS touched
    WHERE sums.report_id = p_report AND sums.account_id = touched.account_id
        AND sums.cell = touched.cell AND sums.users = 0;
END
$$;
COMMENT ON FUNCTION analytics._replace_contributions(integer, text, bigint[]) IS
    'Takes out what users contributed so far, and puts in what the function says now.';

CREATE FUNCTION analytics._maintain_own_report(p_report integer, p_built_to bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_users bigint[] := ARRAY(
        SELECT DISTINCT news.user_key FROM pg_temp.spectrum_news AS news
        WHERE news.user_key <> 0 AND news.user_key <= p_built_to
        ORDER BY news.user_key
    );
    v_name text;
    v_function text;
BEGIN
    SELECT name, definition ->> 'contributions' INTO v_name, v_function
    FROM spectrum.reports WHERE report_id = p_report;
    PERFORM spectrum._check_contributions(v_function);
    PERFORM analytics._replace_contributions(p_report, v_function, v_users);
EXCEPTION
    -- A fault of the function must not keep all other views from being refreshed. What passes by
    -- itself, as a cancel or a full disk, is no fault of it.
    WHEN data_exception OR cardinality_violation OR integrity_constraint_violation
        OR syntax_error_or_access_rule_violation OR program_limit_exceeded
        OR plpgsql_error OR feature_not_supported
    THEN
        UPDATE spectrum.report_definitions SET error_msg = SQLERRM WHERE report = v_name;
        PERFORM spectrum._discard_reports('custom', v_name);
        RAISE WARNING 'report % is given up: %', v_name, SQLERRM
            USING HINT = 'Mend its function, then call spectrum.define_report() again.';
END
$$;
COMMENT ON FUNCTION analytics._maintain_own_report(integer, bigint) IS
    'Moves mv_reports by what the users whom the news concern contribute now, and did before. If '
    'the function fails, the report is given up and its definition says why.';

CREATE FUNCTION analytics._standing_reports()
RETURNS TABLE (account_id text, report text, cell text[], users bigint, amount numeric)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_users bigint[] := ARRAY(
        SELECT dim.user_key FROM warehouse.dim_users AS dim WHERE dim.user_key <> 0
    );
BEGIN
    RETURN QUERY
    SELECT said.account_id, own.name, said.cell, count(*), trim_scale(sum(said.amount))
    FROM spectrum.reports AS own
    CROSS JOIN LATERAL analytics._own_contributions(
        own.definition ->> 'contributions', v_users
    ) AS said
    WHERE own.kind = 'custom' AND own.state = 'served'
    GROUP BY said.account_id, own.name, said.cell;
END
$$;
COMMENT ON FUNCTION analytics._standing_reports() IS
    'What analytics.reports has to show, out of all events: for verify().';
