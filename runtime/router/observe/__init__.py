"""What is counted, logged and traced of a call.

It imports callers, call and admission."""
