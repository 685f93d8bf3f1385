"""What the stage scripts share. Imported before torch, because it sets the environment that torch reads once."""

import os

# OpenMP's threads spin for 300,000 rounds before they sleep, and crawl on a busy machine: see benchmarks/LOG.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
