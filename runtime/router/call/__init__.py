"""The vocabulary: one call, its body, its errors, and what became of it.

It imports admission."""
