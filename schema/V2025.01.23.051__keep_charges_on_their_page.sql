-- Each charge writes its key's row anew. With room for that on the row's page no index has to be told (a heap-only update); on
-- full pages every index of the table is, each in another place for every key. Rows that are stored already move as they are
-- charged; VACUUM FULL moves all at once.
ALTER TABLE cryptography.keys SET (fillfactor = 80);
