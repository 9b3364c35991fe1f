"""Spectrum from the command line and from Python.

The package is thin on purpose: it connects, moves events into ``raw_events`` and calls
``spectrum.*``. What the numbers are is decided in the database alone.

``Client`` sends events from Python code; the command ``spectrum`` does the rest.
"""

from spectrum_shell.client import Client
from spectrum_shell.errors import NotInstalled, SpectrumError

__version__ = "1.1.0"
__all__ = ["Client", "NotInstalled", "SpectrumError", "__version__"]
