"""How a model is run: the contract with an engine, and the engines. It imports nothing: vLLM loads
`guard` through it."""
