"""Runs train.py without HOME, as a user whom the system does not know, as in some containers."""

import os
import pwd
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def fail(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")


pwd.getpwuid = fail
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "MPLCONFIGDIR", "XDG_CONFIG_HOME"):
    os.environ.pop(name, None)

import train  # noqa: E402  (it imports onenight.startup first)

train.main(sys.argv[1:])
