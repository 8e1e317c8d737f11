"""Runs on each host: reports devices and replicas, starts and stops engine processes."""
