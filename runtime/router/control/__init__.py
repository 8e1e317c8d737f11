"""The router among others: its scheduler, its workers, its socket.

It imports the proxy and what lies below that."""
