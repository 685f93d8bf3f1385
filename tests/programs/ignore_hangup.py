"""Runs python with the given arguments and with SIGHUP ignored, as nohup does."""

import os
import signal
import sys

signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
