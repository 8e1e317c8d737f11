"""A node of the simulator: the real core, and engines that cost virtual time only."""
