"""The simulator's parts (docs/simulator.md). Pure: randomness is a seeded `random.Random`."""
