"""What the scheduler does, event by event: no I/O and no clock."""
