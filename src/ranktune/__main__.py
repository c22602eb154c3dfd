"""`python -m ranktune` is the `ranktune` command."""

from ranktune.cli import main

main()
