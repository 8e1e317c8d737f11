"""The stub engine: vLLM's HTTP surface with modelled timings and no model.

It imports the engine's contract, the guard and the wire; nothing of vLLM."""
