-- The one table that stays a member of the extension: no dump holds it, so it is made here.
SELECT spectrum._create_pii_key();

-- The end of the script. A restore sets row_security to off before it creates the extension, and
-- brings the tables itself.
SELECT spectrum.setup()
WHERE pg_catalog.current_setting('row_security') OPERATOR(pg_catalog.=) 'on';
