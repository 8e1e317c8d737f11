"""What jobs, batches, files and webhooks are kept in: one SQLite database.

It imports call."""
