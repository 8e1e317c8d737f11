"""What callers meet: connections, paths, and answers of the router's own.

It may import every other folder of the router."""
