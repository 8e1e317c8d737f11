"""One call carried to a replica and back.

It imports observe, callers, call and admission, which lie below it."""
