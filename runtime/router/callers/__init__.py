"""Whose call it is, what it may do, and what is held for it.

It imports call and admission."""
