-- Room 80, receipts: what forgetting changed, and by how much. Each step brings the views up to the
-- facts, copies what they show of the accounts concerned, does its work, has the views follow and
-- writes down the differences, cell by cell. No batch runs meanwhile, so they are its doing.

CREATE FUNCTION spectrum._create_receipts()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.receipts') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.receipts (
        line_no bigserial NOT NULL CONSTRAINT receipts_pkey PRIMARY KEY,
        task_id bigint NOT NULL,
        object text NOT NULL,
        what text NOT NULL,
        cell jsonb,
        before jsonb,
        after jsonb,
        change numeric
    );
    CREATE INDEX receipts_task_idx ON spectrum.receipts (task_id);
    COMMENT ON TABLE spectrum.receipts IS
        'What forgetting changed: rows of tables, and each standing number. It names nobody.';
    COMMENT ON COLUMN spectrum.receipts.line_no IS 'In the order of writing.';
    COMMENT ON COLUMN spectrum.receipts.task_id IS 'spectrum.tasks, kind forget_user.';
    COMMENT ON COLUMN spectrum.receipts.object IS 'Table or view.';
    COMMENT ON COLUMN spectrum.receipts.what IS
        'rows removed, rows changed, frozen rows removed; or the column of a view.';
    COMMENT ON COLUMN spectrum.receipts.cell IS
        'Which row of the view, by the columns that name it. (erased): what named a row that is '
        'gone.';
    COMMENT ON COLUMN spectrum.receipts.before IS 'NULL: there was no such row.';
    COMMENT ON COLUMN spectrum.receipts.after IS 'NULL: there is no such row any more.';
    COMMENT ON COLUMN spectrum.receipts.change IS 'after - before; a row that is not there is 0.';
END
$$;
COMMENT ON FUNCTION spectrum._create_receipts() IS 'Room 80: makes spectrum.receipts.';

CREATE FUNCTION spectrum._count_all_news()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    LOOP
        PERFORM spectrum._refresh_some(200000);
        EXIT WHEN NOT EXISTS (SELECT FROM spectrum.news)
            AND NOT EXISTS (SELECT FROM spectrum.withdrawals);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._count_all_news() IS 'Brings the standing views up to the facts.';

CREATE FUNCTION spectrum._standing_views()
RETURNS TABLE (view text, is_cell boolean, columns text[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Amounts are bigint, numeric or float; whole numbers that name a cell are integer.
    RETURN QUERY
    SELECT shown.name, shown.is_cell, array_agg(shown.attname ORDER BY shown.attnum)
    FROM (
        SELECT view.name, col.attname::text, col.attnum,
            col.atttypid IN ('text'::regtype, 'text[]'::regtype, 'date'::regtype,
                'integer'::regtype) OR col.attname = 'minute' AS is_cell
        FROM spectrum.report_kinds AS kind
        CROSS JOIN LATERAL unnest(kind.views) AS view (name)
        JOIN pg_attribute AS col ON col.attrelid = format('analytics.%I', view.name)::regclass
        WHERE col.attnum > 0 AND NOT col.attisdropped AND col.attname <> 'as_of'
    ) AS shown
    GROUP BY shown.name, shown.is_cell;
END
$$;
COMMENT ON FUNCTION spectrum._standing_views() IS
    'The standing views, with the columns that name a cell and those that say something of it.';

CREATE FUNCTION spectrum._copy_views(p_accounts text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_view text;
BEGIN
    FOR v_view IN SELECT DISTINCT known.view FROM spectrum._standing_views() AS known LOOP
        EXECUTE format('CREATE TEMPORARY TABLE %I ON COMMIT DROP AS '
            'SELECT * FROM analytics.%I WHERE account_id = ANY (%L)',
            'spectrum_before_' || v_view, v_view, p_accounts);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._copy_views(text[]) IS
    'Copies what the standing views say of some accounts.';

CREATE FUNCTION spectrum._note_before(p_event_ids uuid[])
RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_accounts text[];
BEGIN
    PERFORM spectrum._count_all_news();
    SELECT array_agg(DISTINCT dim.account_id) || '*'::text INTO v_accounts
    FROM warehouse.event_ledger AS ledger
    JOIN warehouse.fact_events AS fact USING (event_id, occurred_at, user_key)
    JOIN warehouse.dim_accounts AS dim USING (account_key)
    WHERE ledger.event_id = ANY (p_event_ids);
    PERFORM spectrum._copy_views(v_accounts);
    RETURN v_accounts;
END
$$;
COMMENT ON FUNCTION spectrum._note_before(uuid[]) IS
    'Copies what the standing views say of the accounts of some events, and of all together, and '
    'returns these accounts.';

CREATE FUNCTION spectrum._note_after(p_task_id bigint, p_accounts text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_view record;
BEGIN
    PERFORM spectrum._count_all_news();
    FOR r_view IN
        SELECT cell.view, cell.columns || amount.columns AS columns,
            (SELECT string_agg(format('%L, %1$I', name), ', ') FROM unnest(cell.columns) AS name)
                AS cell,
            (SELECT string_agg(format('%L, %1$I', name), ', ') FROM unnest(amount.columns) AS name)
                AS amounts
        FROM spectrum._standing_views() AS cell
        JOIN spectrum._standing_views() AS amount USING (view)
        WHERE cell.is_cell AND NOT amount.is_cell
        ORDER BY cell.view
    LOOP
        EXECUTE format(
            'WITH was AS MATERIALIZED (SELECT %1$s FROM pg_temp.%2$I), '
            'shown AS MATERIALIZED (SELECT %1$s FROM analytics.%3$I WHERE account_id = ANY ($2)), '
            'old AS (SELECT jsonb_build_object(%4$s) AS cell, jsonb_build_object(%5$s) AS amounts '
            'FROM (SELECT * FROM was EXCEPT ALL SELECT * FROM shown) AS gone), '
            'new AS (SELECT jsonb_build_object(%4$s) AS cell, jsonb_build_object(%5$s) AS amounts '
            'FROM (SELECT * FROM shown EXCEPT ALL SELECT * FROM was) AS come) '
            'INSERT INTO spectrum.receipts (task_id, object, what, cell, before, after, change) '
            'SELECT $1, %6$L, amount.name, cell, old.amounts -> amount.name, '
            'new.amounts -> amount.name, spectrum._change(old.amounts -> amount.name, '
            'new.amounts -> amount.name) FROM old FULL JOIN new USING (cell) '
            'CROSS JOIN LATERAL jsonb_object_keys(coalesce(old.amounts, new.amounts)) '
            'AS amount (name) '
            'WHERE nullif(old.amounts -> amount.name, ''null'') '
            'IS DISTINCT FROM nullif(new.amounts -> amount.name, ''null'') '
            'ORDER BY cell, amount.name',
            (SELECT string_agg(quote_ident(name), ', ') FROM unnest(r_view.columns) AS name),
            'spectrum_before_' || r_view.view, r_view.view, r_view.cell, r_view.amounts,
            'analytics.' || r_view.view)
        USING p_task_id, p_accounts;
        EXECUTE format('DROP TABLE pg_temp.%I', 'spectrum_before_' || r_view.view);
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._note_after(bigint, text[]) IS
    'Writes down what the standing views say otherwise than in the copy.';

CREATE FUNCTION spectrum._change(p_before jsonb, p_after jsonb)
RETURNS numeric
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN coalesce(jsonb_typeof(p_before), 'number') = 'number'
            AND coalesce(jsonb_typeof(p_after), 'number') = 'number'
        THEN coalesce(p_after::numeric, 0) - coalesce(p_before::numeric, 0)
    END
$$;
COMMENT ON FUNCTION spectrum._change(jsonb, jsonb) IS
    'By how much a number changed; NULL where it was or is none.';

CREATE FUNCTION spectrum._note_rows(p_task_id bigint, p_object text, p_what text, p_rows bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_rows <> 0 THEN
        INSERT INTO spectrum.receipts (task_id, object, what, change)
        VALUES (p_task_id, p_object, p_what, p_rows);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._note_rows(bigint, text, text, bigint) IS
    'Writes down how many rows of a table went (negative) or changed.';

CREATE FUNCTION spectrum._user_rows(p_table text, p_user_keys bigint[])
RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_rows bigint;
BEGIN
    EXECUTE format('SELECT count(*) FROM %s AS kept CROSS JOIN spectrum.reports AS report WHERE %s',
        p_table, spectrum._of_user(p_table))
    INTO v_rows USING p_user_keys;
    RETURN v_rows;
END
$$;
COMMENT ON FUNCTION spectrum._user_rows(text, bigint[]) IS
    'How many rows of a rollup table are kept for some users.';

CREATE FUNCTION spectrum._of_user(p_table text)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN 'report.report_id = kept.report_id '
        || CASE WHEN EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = p_table::regclass AND attname = 'user_key' AND NOT attisdropped)
        THEN 'AND kept.user_key = ANY ($1)'
        ELSE 'AND report.definition ->> ''unit'' <> ''account'' AND kept.unit = ANY ($1)' END;
END
$$;
COMMENT ON FUNCTION spectrum._of_user(text) IS 'Which rows of a rollup table are of users $1.';

CREATE FUNCTION spectrum._user_tables()
RETURNS SETOF text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT DISTINCT kept.name
    FROM spectrum.report_kinds AS kind
    CROSS JOIN LATERAL unnest(kind.tables) AS kept (name)
    JOIN pg_attribute AS col ON col.attrelid = kept.name::regclass
    WHERE col.attname IN ('user_key', 'unit') AND NOT col.attisdropped
    ORDER BY kept.name;
END
$$;
COMMENT ON FUNCTION spectrum._user_tables() IS 'The tables that keep rows for single users.';

CREATE FUNCTION spectrum._note_state(p_task_id bigint, p_user_keys bigint[], p_sign integer)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Once with +, once with -: what is left when the receipt is closed are the rows that went.
    PERFORM spectrum._note_rows(p_task_id, kept.name, 'rows removed',
        -p_sign * spectrum._user_rows(kept.name, p_user_keys))
    FROM spectrum._user_tables() AS kept (name);
END
$$;
COMMENT ON FUNCTION spectrum._note_state(bigint, bigint[], integer) IS
    'Writes down how many rows are kept for users: before (1), and at the end (-1).';

CREATE FUNCTION spectrum._erase_frozen(p_task_id bigint, p_user_keys bigint[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_table text;
    v_rows bigint;
BEGIN
    -- All that follows from facts is gone by now. What is still here follows from facts that are
    -- not here any more: the sums made of it stay as they are.
    FOR v_table IN SELECT kept.name FROM spectrum._user_tables() AS kept (name) LOOP
        EXECUTE format('DELETE FROM %s AS kept USING spectrum.reports AS report WHERE %s',
            v_table, spectrum._of_user(v_table)) USING p_user_keys;
        GET DIAGNOSTICS v_rows = ROW_COUNT;
        PERFORM spectrum._note_rows(p_task_id, v_table, 'frozen rows removed', -v_rows);
    END LOOP;
    DELETE FROM spectrum.shared_users WHERE user_key = ANY (p_user_keys);
END
$$;
COMMENT ON FUNCTION spectrum._erase_frozen(bigint, bigint[]) IS
    'Removes what is still kept for users whose facts are gone, and says so.';

CREATE FUNCTION spectrum._without_names(p_object text, p_cell jsonb)
RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT p_cell || coalesce(jsonb_object_agg(part.key, '(erased)'), '{}')
    FROM jsonb_each(p_cell) AS part
    WHERE part.value <> 'null' AND (part.key IN ('property', 'value', 'feature', 'endpoint',
            'service', 'version', 'variant', 'cell')
        OR (part.key = 'breakdown' AND p_object = 'analytics.conversion_funnels')
        OR (part.key IN ('source', 'medium', 'campaign')
            AND p_object = 'analytics.attributed_conversions'))
$$;
COMMENT ON FUNCTION spectrum._without_names(text, jsonb) IS
    'A cell without what properties of events may have named it by.';

CREATE FUNCTION spectrum._close_receipt(p_task_id bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    WITH lines AS (DELETE FROM spectrum.receipts WHERE task_id = p_task_id RETURNING *),
    sums AS MATERIALIZED (
        SELECT line.object, line.what, line.cell,
            (array_agg(line.before ORDER BY line.line_no))[1] AS before,
            (array_agg(line.after ORDER BY line.line_no DESC))[1] AS after,
            CASE WHEN bool_and(line.change IS NOT NULL) THEN sum(line.change) END AS change,
            min(line.line_no) AS first_no, max(line.line_no) AS last_no
        FROM lines AS line
        GROUP BY line.object, line.what, line.cell
    ), latest AS MATERIALIZED (
        SELECT DISTINCT ON (sums.object, sums.cell) sums.object, sums.cell, sums.after IS NULL
            AS is_gone
        FROM sums
        WHERE sums.cell IS NOT NULL
        ORDER BY sums.object, sums.cell, sums.last_no DESC
    )
    INSERT INTO spectrum.receipts (task_id, object, what, cell, before, after, change)
    SELECT p_task_id, sums.object, sums.what, sums.cell, sums.before,
        CASE WHEN NOT latest.is_gone THEN sums.after END, sums.change
    FROM sums
    LEFT JOIN latest ON latest.object = sums.object AND latest.cell = sums.cell
    WHERE (sums.cell IS NULL AND sums.change <> 0) OR sums.before IS DISTINCT FROM sums.after
    ORDER BY (sums.object LIKE 'analytics.%'), sums.object, sums.first_no;

    -- What a cell was called by goes with the cell, from older receipts too.
    UPDATE spectrum.receipts AS line
    SET cell = spectrum._without_names(line.object, line.cell)
    FROM (
        SELECT DISTINCT told.object, told.cell FROM spectrum.receipts AS told
        WHERE told.task_id = p_task_id AND told.cell IS NOT NULL AND told.after IS NULL
            AND spectrum._without_names(told.object, told.cell) <> told.cell
    ) AS gone
    WHERE line.object = gone.object AND line.cell = gone.cell;
END
$$;
COMMENT ON FUNCTION spectrum._close_receipt(bigint) IS
    'Makes one line of what single steps wrote down, and takes out what cells that are gone were '
    'called by.';

CREATE FUNCTION spectrum._sum_up_receipt(p_task_id bigint)
RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN jsonb_build_object(
        'tables', (
            SELECT coalesce(jsonb_object_agg(line.object || ': ' || line.what, line.change), '{}')
            FROM spectrum.receipts AS line
            WHERE line.task_id = p_task_id AND line.cell IS NULL
        ),
        'numbers', (
            SELECT coalesce(jsonb_object_agg(of_view.object, of_view.numbers), '{}')
            FROM (
                SELECT line.object, count(*) AS numbers FROM spectrum.receipts AS line
                WHERE line.task_id = p_task_id AND line.cell IS NOT NULL
                GROUP BY line.object
            ) AS of_view
        )
    );
END
$$;
COMMENT ON FUNCTION spectrum._sum_up_receipt(bigint) IS
    'Rows of tables that went or changed, and how many numbers of each view did.';
