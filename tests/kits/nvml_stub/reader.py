"""Runs in its own process, because the loader looks for libnvidia-ml.so.1 where the environment
says: opens devices as the agent does, then answers each line of pids with one line of reports."""

import json
import sys

import msgspec

from agent.devices.inventory import open_devices

try:
    source = open_devices(sys.argv[1], "node-1")
except ValueError as error:
    print(json.dumps({"error": str(error)}), flush=True)
    sys.exit(3)
print(json.dumps({"kind": source.kind}), flush=True)
for line in sys.stdin:
    reports = source.read(json.loads(line))
    answer = {"reports": reports, "replica_bytes": source.replica_bytes()}
    print(msgspec.json.encode(answer).decode(), flush=True)
source.close()
