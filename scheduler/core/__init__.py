"""What the scheduler does, event by event and whoever chooses; decisions.py lists its parts.
No I/O and no clock.

It imports policy, state and signals."""
