"""Run the command line: ``python -m convscope``."""

from convscope.cli import main

main()
