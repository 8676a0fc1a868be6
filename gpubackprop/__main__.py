"""`python -m gpubackprop` is the command `gpubackprop`."""

from gpubackprop.cli import main

main(prog_name="gpubackprop")
