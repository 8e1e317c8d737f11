"""Where the parts find each other: Consul, or a file that stands in for it.

It imports the contract and the ground of runtime/, and knows nothing of models."""
