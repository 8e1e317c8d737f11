"""The host: its GPUs and its memory, and word that it is about to be taken away."""
