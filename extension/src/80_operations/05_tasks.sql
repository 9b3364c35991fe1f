-- Room 80, tasks: long work in bounded steps. A task is a row that says what is to be done and how
-- far it is. Each step is one transaction, so a kill loses at most the step under way, and whoever
-- comes next, the tick or the one who asked, goes on from there.
--
-- A kind of task is two functions: spectrum._check_<kind>(arguments) refuses what cannot be done
-- when it is asked for; spectrum._do_<kind>(task_id) does one step, moves position and done, and
-- returns whether there is more to do.

CREATE FUNCTION spectrum._create_tasks()
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regclass('spectrum.tasks') IS NOT NULL THEN
        RETURN;
    END IF;

    CREATE TABLE spectrum.tasks (
        task_id bigint NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT tasks_pkey PRIMARY KEY,
        kind text NOT NULL,
        arguments jsonb NOT NULL DEFAULT '{}',
        state text NOT NULL DEFAULT 'waiting'
            CONSTRAINT tasks_state_is_known
            CHECK (state IN ('waiting', 'running', 'done', 'failed', 'cancelled')),
        asked_by text NOT NULL DEFAULT current_user,
        asked_at timestamptz NOT NULL DEFAULT now(),
        started_at timestamptz,
        finished_at timestamptz,
        position bigint NOT NULL DEFAULT 0,
        done bigint NOT NULL DEFAULT 0,
        total bigint,
        unit text,
        outcome jsonb NOT NULL DEFAULT '{}',
        error_msg text,
        next_step_at timestamptz
    );
    CREATE INDEX tasks_open_idx ON spectrum.tasks (task_id)
    WHERE state IN ('waiting', 'running');
    COMMENT ON TABLE spectrum.tasks IS
        'Long work that was asked for, done in steps by spectrum.run() or by who asked. Kept.';
    COMMENT ON COLUMN spectrum.tasks.task_id IS 'In the order in which they were asked for.';
    COMMENT ON COLUMN spectrum.tasks.kind IS 'What is to be done.';
    COMMENT ON COLUMN spectrum.tasks.arguments IS 'To what: see the procedure of that name.';
    COMMENT ON COLUMN spectrum.tasks.state IS
        'waiting, running, done, failed (a step raised an error) or cancelled.';
    COMMENT ON COLUMN spectrum.tasks.asked_by IS 'Who asked for it, by the name at log-in.';
    COMMENT ON COLUMN spectrum.tasks.asked_at IS 'When.';
    COMMENT ON COLUMN spectrum.tasks.started_at IS 'Begin of the first step.';
    COMMENT ON COLUMN spectrum.tasks.finished_at IS 'End of the last step.';
    COMMENT ON COLUMN spectrum.tasks.position IS
        'Where the next step begins; what it counts is the business of the kind.';
    COMMENT ON COLUMN spectrum.tasks.done IS 'How much is done, in units.';
    COMMENT ON COLUMN spectrum.tasks.total IS 'Of how much, about; NULL where that is not known.';
    COMMENT ON COLUMN spectrum.tasks.unit IS 'What done and total count.';
    COMMENT ON COLUMN spectrum.tasks.outcome IS 'What came of it, as far as it is done.';
    COMMENT ON COLUMN spectrum.tasks.error_msg IS
        'What ended it, or what held its last step up; with the SQLSTATE.';
    COMMENT ON COLUMN spectrum.tasks.next_step_at IS
        'Where a step was held up: not before. NULL: at once.';
END
$$;
COMMENT ON FUNCTION spectrum._create_tasks() IS 'Room 80: makes spectrum.tasks.';

CREATE FUNCTION spectrum._task_kinds()
RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT ARRAY['reprocess', 'purge_raw', 'pack_facts', 'purge_facts', 'forget_user']
$$;
COMMENT ON FUNCTION spectrum._task_kinds() IS 'The kinds of tasks there are.';

CREATE FUNCTION spectrum.request(p_kind text, p_arguments jsonb DEFAULT '{}')
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_arguments jsonb := coalesce(jsonb_strip_nulls(p_arguments), '{}');
    v_task_id bigint;
BEGIN
    PERFORM spectrum._check_choice('p_kind', p_kind, spectrum._task_kinds());
    IF jsonb_typeof(v_arguments) <> 'object' THEN
        PERFORM spectrum._reject('p_arguments', p_arguments::text, 'a JSON object');
    END IF;
    EXECUTE format('SELECT spectrum.%I($1)', '_check_' || p_kind) USING v_arguments;
    -- As who asks means them: who carries it out may be in another time zone, and on another day.
    v_arguments := v_arguments || (
        SELECT coalesce(jsonb_object_agg(given.name, given.value::timestamptz), '{}')
        FROM jsonb_each_text(v_arguments) AS given (name, value)
        WHERE given.name IN ('from', 'to')
    );
    -- The function runs as its owner; who logged in is what it cannot be told wrongly.
    INSERT INTO spectrum.tasks (kind, arguments, asked_by)
    VALUES (p_kind, v_arguments, session_user)
    RETURNING tasks.task_id INTO v_task_id;
    RETURN v_task_id;
END
$$;
COMMENT ON FUNCTION spectrum.request(text, jsonb) IS
    'Asks for long work, which the next runs carry out in steps, and returns its task_id: see '
    'spectrum.tasks and spectrum.progress. The arguments are those of the procedure of the same '
    'name, without p_.';

CREATE FUNCTION spectrum._check_arguments(p_arguments jsonb, p_types jsonb)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_argument record;
BEGIN
    FOR r_argument IN
        SELECT given.name, given.value, p_types ->> given.name AS type
        FROM jsonb_each_text(p_arguments) AS given (name, value)
        ORDER BY given.name
    LOOP
        IF r_argument.type IS NULL THEN
            PERFORM spectrum._reject('p_arguments', r_argument.name, 'arguments called: '
                || (SELECT string_agg(known.name, ', ') FROM jsonb_object_keys(p_types)
                    AS known (name)));
        END IF;
        BEGIN
            EXECUTE format('SELECT %L::%s', r_argument.value, r_argument.type::regtype);
        EXCEPTION
            WHEN data_exception THEN
                PERFORM spectrum._reject(
                    'p_' || r_argument.name, r_argument.value, 'a value of type ' || r_argument.type
                );
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION spectrum._check_arguments(jsonb, jsonb) IS
    'Raises 22023 unless every argument of a task is one of those in p_types (name: type) and its '
    'value reads as that type.';

CREATE FUNCTION spectrum._check_age(p_age text)
RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF p_age IS NULL OR p_age::interval NOT BETWEEN interval '0' AND interval '1000 years' THEN
        PERFORM spectrum._reject('p_older_than', p_age, 'an age, such as 90 days');
    END IF;
END
$$;
COMMENT ON FUNCTION spectrum._check_age(text) IS
    'Raises 22023 unless older_than, an interval, is an age from nothing to a thousand years.';

CREATE FUNCTION spectrum._work_on_task(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_kind text;
    v_has_more boolean;
    v_state text;
    v_message text;
BEGIN
    -- Who else works on it has the row: step by step, never both at once.
    UPDATE spectrum.tasks
    SET state = 'running', started_at = coalesce(started_at, clock_timestamp()), error_msg = NULL
    WHERE task_id = p_task_id AND state IN ('waiting', 'running')
    RETURNING kind INTO v_kind;
    IF v_kind IS NULL THEN
        RETURN false;
    END IF;
    BEGIN
        EXECUTE format('SELECT spectrum.%I($1)', '_do_' || v_kind)
        INTO STRICT v_has_more USING p_task_id;
        IF v_has_more THEN
            RETURN true;
        END IF;
        v_state := 'done';
    EXCEPTION
        -- Passes: the step is tried again after a while.
        WHEN lock_not_available OR deadlock_detected THEN
            v_state := 'running';
            v_message := format('%s (SQLSTATE %s)', sqlerrm, sqlstate);
        WHEN OTHERS THEN
            v_state := 'failed';
            v_message := format('%s (SQLSTATE %s)', sqlerrm, sqlstate);
    END;
    UPDATE spectrum.tasks
    SET state = v_state,
        finished_at = CASE WHEN v_state <> 'running' THEN clock_timestamp() END,
        error_msg = spectrum._one_line(v_message),
        next_step_at = CASE WHEN v_state = 'running'
            THEN clock_timestamp() + (SELECT config.retry_delay FROM spectrum.config) END
    WHERE task_id = p_task_id;
    RETURN false;
END
$$;
COMMENT ON FUNCTION spectrum._work_on_task(bigint) IS
    'One step of a task: true where it may go on at once. An error undoes the step and ends the '
    'task, unless it can pass: then the task stays open.';

CREATE FUNCTION spectrum._task_outcome(p_task_id bigint)
RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    r_task record;
BEGIN
    SELECT task.kind, task.state, task.outcome, task.error_msg INTO r_task
    FROM spectrum.tasks AS task WHERE task.task_id = p_task_id;
    IF r_task.state <> 'done' THEN
        RAISE EXCEPTION '% (task %) is %: %', r_task.kind, p_task_id, r_task.state,
            coalesce(r_task.error_msg, 'it was not finished')
            USING
                ERRCODE = coalesce(
                    substring(r_task.error_msg FROM 'SQLSTATE (.{5})\)$'), 'query_canceled'
                ),
                HINT = CASE r_task.state
                    WHEN 'running' THEN 'What is done is done; spectrum.run() goes on with it.'
                    ELSE 'What is done is done; call it again for the rest.'
                END;
    END IF;
    RETURN r_task.outcome;
END
$$;
COMMENT ON FUNCTION spectrum._task_outcome(bigint) IS
    'What came of a task that was carried out at once; raises what ended it before its end.';

CREATE PROCEDURE spectrum._carry_out(
    p_kind text,
    p_arguments jsonb,
    p_counted text,
    INOUT counted bigint
)
LANGUAGE plpgsql
AS $$
DECLARE
    v_task_id bigint;
    v_has_more boolean := true;
BEGIN
    -- Inside a transaction block this fails, before anything is done.
    COMMIT;
    v_task_id := spectrum.request(p_kind, p_arguments);
    WHILE v_has_more LOOP
        COMMIT;
        SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
        v_has_more := spectrum._work_on_task(v_task_id);
    END LOOP;
    COMMIT;
    counted := pg_catalog.jsonb_extract_path_text(
        spectrum._task_outcome(v_task_id), p_counted
    )::pg_catalog.int8;
END
$$;
COMMENT ON PROCEDURE spectrum._carry_out(text, jsonb, text, bigint) IS
    'Asks for a task and does all of it at once, a commit after each step. Returns one number of '
    'its outcome.';

CREATE FUNCTION spectrum.cancel_task(p_task_id bigint)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE spectrum.tasks SET state = 'cancelled', finished_at = clock_timestamp()
    WHERE task_id = p_task_id AND state IN ('waiting', 'running');
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION spectrum.cancel_task(bigint) IS
    'Has no further step of a task done; what is done stays. False where it is not open.';

CREATE FUNCTION spectrum._work_on_tasks()
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_task_id bigint;
    v_kind text;
BEGIN
    SELECT task.task_id, task.kind INTO v_task_id, v_kind
    FROM spectrum.tasks AS task
    WHERE task.state IN ('waiting', 'running')
        AND (task.next_step_at IS NULL OR task.next_step_at <= clock_timestamp())
    ORDER BY task.task_id
    LIMIT 1
    FOR UPDATE SKIP LOCKED;
    IF v_task_id IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM spectrum._work_on_task(v_task_id);
    RETURN format('task %s, %s', v_task_id, v_kind);
END
$$;
COMMENT ON FUNCTION spectrum._work_on_tasks() IS
    'Step of a run: one step of the oldest open task; NULL where there is none.';

CREATE FUNCTION spectrum._check_tasks(OUT ok boolean, OUT message text, OUT what_to_do text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    SELECT string_agg(format('%s (task %s): %s', task.kind, task.task_id, task.error_msg), '; ')
    INTO message
    FROM spectrum.tasks AS task
    WHERE task.error_msg IS NOT NULL AND (task.finished_at > now() - interval '1 day'
        OR task.state = 'running');
    ok := message IS NULL;
    message := coalesce(message, 'none failed in a day');
    what_to_do := 'SELECT * FROM spectrum.tasks; and once the cause is gone, ask for it again.';
END
$$;
COMMENT ON FUNCTION spectrum._check_tasks() IS
    'Check of health(): tasks that failed lately or are held up.';
