"""The command line: each command parses, makes one call, and prints the path of what it wrote.

Paths go to stdout, all else to stderr. Exit codes: 0 done, 1 a problem told in one line, 2 wrong usage.
A file holds a family of commands, which join the group when they are imported here.
"""

import os

# OpenMP threads that spin while they wait slow every other process down, and themselves with it: a training
# step beside one busy process took 8 s spinning and 1 s waiting. Read once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from sae_steer.cli import cache, dictionary, features, findings, intervene, pair, run, selftest
from sae_steer.cli.group import main

__all__ = ["cache", "dictionary", "features", "findings", "intervene", "main", "pair", "run", "selftest"]
