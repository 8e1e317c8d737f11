"""The HTTP face: what operators, agents and routers ask, and what they are shown.

It may import everything but `main`."""
