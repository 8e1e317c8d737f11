"""The host's models: fetched from hubs, buckets and other hosts, kept, and given on."""
