"""`python -m sae_steer`: the command line, for launchers such as torchrun."""

from sae_steer.cli import main

main(prog_name="sae-steer")
