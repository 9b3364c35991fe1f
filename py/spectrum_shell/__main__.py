"""``python -m spectrum_shell`` is the command ``spectrum``."""

from spectrum_shell.cli import main

main()
