"""Commands, their settings files, and what the terminal shows."""

from amici_eval.cli.commands import main

__all__ = ["main"]
