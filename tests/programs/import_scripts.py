"""Imports the scripts with arguments that they would refuse if they read them."""

import sys

sys.argv[1:] = ["--bogus", "missing.py"]

import configurator  # noqa: E402, F401
import export  # noqa: E402, F401
import prepare_single_parquet  # noqa: E402, F401
import sample  # noqa: E402, F401
import train  # noqa: E402, F401
