"""Run with -m by test_launcher.py: writes all that a program can see of itself to argv[1]."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    report = {
        "environ": dict(os.environ),
        "proc_environ": [
            e for e in Path("/proc/self/environ").read_bytes().decode().split("\0") if e
        ],
        "argv": sys.argv,
        "path": sys.path,
        "main": __spec__.name,
        "cwd": os.getcwd(),
        "umask": os.umask(0o022),
        "leads_session": os.getsid(0) == os.getpid(),
        "leads_group": os.getpgid(0) == os.getpid(),
        "signals": {s.name: str(signal.getsignal(s)) for s in signal.valid_signals() if s < 32},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "fds": sorted(
            fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/dev/fd/{fd}")
        ),
        "stdin": os.readlink("/proc/self/fd/0"),
        "stdout": os.readlink("/proc/self/fd/1"),
        "stderr": os.readlink("/proc/self/fd/2"),
        "tempdir": tempfile.gettempdir(),
        "threads": threading.active_count(),
        "method": multiprocessing.get_start_method(),
        "unlike": [random.random(), os.urandom(4).hex()],
        "authkey": bytes(multiprocessing.current_process().authkey).hex(),
    }
    print("said on stdout", flush=True)
    print("said on stderr", file=sys.stderr, flush=True)
    with open(sys.argv[1] + ".tmp", "w") as file:
        json.dump(report, file)
    os.rename(sys.argv[1] + ".tmp", sys.argv[1])
    if sys.argv[2] == "wait":
        time.sleep(600)
    if sys.argv[2] == "late":
        atexit.register(print, "last words")
        threading.Timer(0.2, print, ["from a thread that is no daemon"]).start()
        sys.exit("why it ended")
    sys.exit(int(sys.argv[2]))
