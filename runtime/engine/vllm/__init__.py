"""All that is known of vLLM: its arguments, memory, adapters, and what is forked of it.

It imports the engine's contract, the contract and checkpoints; no other engine."""
