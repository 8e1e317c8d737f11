"""The host's models: fetched from hubs, buckets and other hosts, kept, and given on.

It imports core and the agent's ground (address, link, metrics, tasks); not devices or sim."""
