-- Room 18, temporary tables: what the functions of one transaction hand on to each other. They stay
-- with the session, so one of an earlier release may be met.

CREATE FUNCTION spectrum._empty_temporary(p_name text, p_columns text, p_few bigint DEFAULT 0)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_table regclass := to_regclass(format('pg_temp.%I', p_name));
BEGIN
    -- Its comment tells its columns.
    IF v_table IS NOT NULL AND obj_description(v_table, 'pg_class') IS DISTINCT FROM p_columns THEN
        EXECUTE format('DROP TABLE pg_temp.%I', p_name);
        v_table := NULL;
    END IF;
    IF v_table IS NULL THEN
        EXECUTE format('CREATE TEMPORARY TABLE %I (%s) ON COMMIT DELETE ROWS', p_name, p_columns);
        EXECUTE format('COMMENT ON TABLE pg_temp.%I IS %L', p_name, p_columns);
    ELSIF pg_relation_size(v_table) > p_few THEN
        -- Not DELETE: whoever reads it next would wade through the rows of all before.
        EXECUTE format('TRUNCATE pg_temp.%I', p_name);
    ELSIF pg_relation_size(v_table) > 0 THEN
        EXECUTE format('DELETE FROM pg_temp.%I', p_name);
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._empty_temporary(text, text, bigint) IS
    'Makes a temporary table of the session, or empties it: of up to p_few bytes by DELETE, which '
    'keeps the plans that name it.';
