"""One replica on this node: started, probed, ended, adopted, and what is remembered of it.

It imports every other folder of the agent but sim, and `host`; the node puts it together."""
