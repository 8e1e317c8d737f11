"""Work that nobody waits for on a connection: files, batches, jobs and webhooks."""
