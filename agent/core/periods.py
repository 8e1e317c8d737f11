"""How often the agent's core is told of the time, and of how its engines do. Pure."""

TICK_S = 0.1
START_PROBE_S = 0.04  # half of it is what every start waits for longer than it must
READY_PROBE_S = 1.0  # asleep too
DRAIN_PROBE_S = 0.1
