"""What is known of the cluster, and what is told about it: models, nodes, replicas. Pure.

It imports signals."""
