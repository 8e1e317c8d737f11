"""What the agent decides, as a state machine: no I/O and no clock.

It imports nothing of the agent."""
