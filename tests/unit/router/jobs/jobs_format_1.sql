-- A store as the first format had it, with something in it.
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    created_at REAL NOT NULL, expires_at REAL NOT NULL, batch INTEGER, outcome INTEGER,
    whole INTEGER NOT NULL
);
CREATE TABLE chunks (file INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL);
CREATE UNIQUE INDEX chunks_in_order ON chunks (file, number);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    key_id TEXT, endpoint TEXT NOT NULL, input INTEGER NOT NULL, input_id TEXT NOT NULL,
    metadata TEXT, created_at REAL NOT NULL, expires_at REAL NOT NULL, keep_s REAL NOT NULL,
    webhook TEXT, status TEXT NOT NULL, stamps TEXT NOT NULL DEFAULT '{}', errors TEXT,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, output_id TEXT, error_id TEXT, ended_at REAL
);
CREATE INDEX batches_unfinished ON batches (tenant, seq) WHERE ended_at IS NULL;
-- An output file is no copy: it is the results of one outcome, read in order.
CREATE TABLE lines (
    batch INTEGER NOT NULL, line INTEGER NOT NULL, custom_id TEXT NOT NULL, model TEXT NOT NULL,
    start INTEGER NOT NULL, size_bytes INTEGER NOT NULL, outcome INTEGER NOT NULL DEFAULT 0,
    result BLOB
);
CREATE UNIQUE INDEX lines_in_order ON lines (batch, outcome, line);
CREATE UNIQUE INDEX lines_by_number ON lines (batch, line);
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    key_id TEXT, priority INTEGER NOT NULL, model TEXT NOT NULL, path TEXT NOT NULL,
    created_at REAL NOT NULL, deadline_at REAL NOT NULL, webhook TEXT, status TEXT NOT NULL,
    started_at REAL, ended_at REAL, expires_at REAL, code INTEGER, waits_for TEXT,
    body BLOB, answer BLOB
);
CREATE INDEX jobs_unfinished ON jobs (seq) WHERE ended_at IS NULL;
CREATE TABLE hooks (id TEXT PRIMARY KEY, url TEXT NOT NULL, body BLOB NOT NULL);
INSERT INTO files VALUES (1, 'file-1', 'a', 'in.jsonl', 'batch', 1, 1.0, 9e9, NULL, NULL, 1);
INSERT INTO jobs (seq, id, tenant, priority, model, path, created_at, deadline_at, status, body)
    VALUES (1, 'job_1', 'a', 0, 'm', '/v1/completions', 1.0, 9e9, 'queued', '{}');
INSERT INTO jobs (seq, id, tenant, priority, model, path, created_at, deadline_at, status, ended_at)
    VALUES (2, 'job_2', 'b', 0, 'm', '/v1/completions', 1.0, 9e9, 'failed', 2.0);
INSERT INTO hooks VALUES ('evt_1', 'https://x.example/', '{"data": {"id": "job_2"}}');
PRAGMA user_version = 1;
