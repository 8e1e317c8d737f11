"""What is learnt of callers as time goes by: when they come, how many. Pure.

It imports nothing of the scheduler."""
