"""The suite. More threads than cores wait for each other without turning: what they would burn is another test's."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported, which no one has done yet
