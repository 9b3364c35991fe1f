
-- What is new is open to PUBLIC as yet. Only that: to touch the rights of others here would make
-- them a part of the extension, and dumps would leave them out.
DO $$
DECLARE
    r_routine record;
BEGIN
    FOR r_routine IN
        SELECT oid::regprocedure AS name
        FROM pg_proc
        WHERE pronamespace::regnamespace::text IN ('spectrum', 'warehouse', 'analytics')
            AND NOT EXISTS (
                SELECT FROM pg_init_privs AS initial
                WHERE initial.classoid = 'pg_proc'::regclass AND initial.objoid = pg_proc.oid
            )
    LOOP
        EXECUTE format('REVOKE ALL ON ROUTINE %s FROM PUBLIC', r_routine.name);
    END LOOP;
END
$$;

SELECT spectrum._create_pii_key();
SELECT spectrum.setup();
