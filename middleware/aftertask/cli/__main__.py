"""`python -m aftertask.cli`: the same as the `aftertask` command."""

from . import main

main()
