"""What torchrun says of this process in its environment; torch is not needed to read it."""

import os

from sae_steer.errors import InputError

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets beside WORLD_SIZE."""


def processes() -> int:
    """How many processes share the run; a WORLD_SIZE that torchrun did not set is an `InputError`."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not (said.isdecimal() and int(said)):
        raise InputError(f"WORLD_SIZE is {said!r}, which is no number of processes; unset it, or start with torchrun")
    lacking = [name for name in VARIABLES if name not in os.environ]
    if int(said) > 1 and lacking:
        raise InputError(
            f"WORLD_SIZE is {said} and {lacking[0]} is not set; start the processes with torchrun, or unset WORLD_SIZE"
        )
    return int(said)
