"""The simulator's parts (docs/simulator.md). Pure: randomness is a seeded `random.Random`.

It imports core and what lies below that."""
