"""The HTTP face of jobs, batches and files.

It may import every other folder of jobs."""
