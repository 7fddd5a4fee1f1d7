"""`python -m harmonica_rt.cli`, for `torchrun -m`."""

from harmonica_rt.cli import main

main()
