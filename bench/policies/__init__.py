"""Baselines for bench/policy.py, written against scheduler/sim/policy.py's contract."""
