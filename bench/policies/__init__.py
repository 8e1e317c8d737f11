"""Baselines and workloads for bench/policy.py; the baselines implement `Choices`
(scheduler/policy/choices.py)."""
