"""One replica on this node: started, probed, ended, adopted, and what is remembered of it."""
