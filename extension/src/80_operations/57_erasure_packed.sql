-- Room 80, erasure of packed facts (60_analytics/00_packed.sql): a part of the step `events` of
-- forget_user. What is frozen counts them still, but for the days: questions are asked of these.

CREATE FUNCTION spectrum._erase_packed(p_task_id bigint)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    r_erasure record := spectrum._erasure(p_task_id);
    v_facts bigint;
BEGIN
    PERFORM spectrum._empty_temporary('spectrum_erased', 'event_id uuid, '
        'occurred_at timestamptz, account_key bigint, user_key bigint, event_type_key integer');
    INSERT INTO pg_temp.spectrum_erased (
        event_id, occurred_at, account_key, user_key, event_type_key)
    SELECT gone.event_id, gone.occurred_at, gone.account_key, gone.user_key, gone.event_type_key
    FROM spectrum._rewrite_packed(r_erasure.user_keys, analytics._event_key(r_erasure.event_type),
        r_erasure.from_at, r_erasure.to_at) AS gone;
    GET DIAGNOSTICS v_facts = ROW_COUNT;
    IF v_facts = 0 THEN
        RETURN;
    END IF;
    -- Of these only what is not kept any more is left: the raw events are looked at next.
    DELETE FROM warehouse.event_ledger AS ledger
    USING pg_temp.spectrum_erased AS gone WHERE ledger.event_id = gone.event_id;
    PERFORM spectrum._note_rows(p_task_id, 'warehouse.packed_rows', 'rows removed', -v_facts);
    PERFORM spectrum._note_rows(p_task_id, 'warehouse.event_ledger', 'rows removed', -v_facts);
    PERFORM spectrum._uncount_packed(p_task_id, r_erasure.is_whole);
END
$$;
COMMENT ON FUNCTION spectrum._erase_packed(bigint) IS
    'Takes packed facts out, and out of the sums of days.';

CREATE FUNCTION spectrum._uncount_packed(p_task_id bigint, p_is_whole boolean)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_accounts text[] := ARRAY(
        SELECT DISTINCT dim.account_id
        FROM pg_temp.spectrum_erased JOIN warehouse.dim_accounts AS dim USING (account_key)
    ) || '*'::text;
    v_is_exact boolean;
BEGIN
    PERFORM spectrum._count_all_news();
    -- Of who stays, a day may go that what is frozen was made of.
    v_is_exact := p_is_whole AND (SELECT state.is_exact FROM analytics.user_days_state AS state);
    UPDATE spectrum.horizon SET packed_without = CASE WHEN v_is_exact
        THEN coalesce(packed_without, 'sums') ELSE 'days' END;
    IF NOT v_is_exact THEN
        RETURN;
    END IF;
    PERFORM spectrum._copy_views(v_accounts);
    PERFORM spectrum._clear_news();
    INSERT INTO pg_temp.spectrum_news (
        sign, scope, user_key, account_key, event_type_key, occurred_at, event_id)
    SELECT -1, gone.account_key, gone.user_key, gone.account_key, gone.event_type_key,
        gone.occurred_at, gone.event_id
    FROM pg_temp.spectrum_erased AS gone;
    PERFORM spectrum._scope_news();
    PERFORM CASE report.kind
        WHEN 'volume' THEN analytics._maintain_daily_events(report.report_id, report.built_to)
        WHEN 'activity' THEN analytics._maintain_active_users(report.report_id, report.built_to)
        END
    FROM spectrum.reports AS report
    WHERE report.kind IN ('volume', 'activity') AND report.state = 'served';
    PERFORM spectrum._note_after(p_task_id, v_accounts);
END
$$;
COMMENT ON FUNCTION spectrum._uncount_packed(bigint, boolean) IS
    'Has events by day and active users follow what was taken out of packed facts, so that days '
    'that are kept are told still, where it was all of a user. What else is frozen stays.';
