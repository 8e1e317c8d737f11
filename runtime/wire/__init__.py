"""What the parts say to each other: frozen structs, and nothing else. It imports nothing of ours.

Rules this package keeps:
- every message is full state or an idempotent command, never a delta;
- units are the last word of a name; times are ages (`..._s` ago), never wall-clock stamps of
  another host, since hosts' clocks differ.
"""
