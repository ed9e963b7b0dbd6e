"""`python -m softprompts`."""

from softprompts.cli import main

main()
