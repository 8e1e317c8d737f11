"""The host: its GPUs and its memory, and word that it is about to be taken away.

It imports core and the agent's ground; not cache or sim."""
