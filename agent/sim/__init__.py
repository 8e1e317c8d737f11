"""A node of the simulator: the production core, and engines that cost virtual time only.

It imports core; pure."""
