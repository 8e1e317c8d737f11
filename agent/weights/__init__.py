"""How weights get into an engine: what is read, from where, and what is kept ready.

It imports engines, cache, devices, core and the agent's ground."""
