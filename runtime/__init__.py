"""The contract every part of Stoker shares, and the request path."""
