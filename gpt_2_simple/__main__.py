"""The command line as a program: `gpt_2_simple`, or `python -m gpt_2_simple`."""

# PYTHON_ARGCOMPLETE_OK
from __future__ import annotations

import sys


def run() -> int:
    """Runs the command that the process was started with; returns the exit status."""
    try:
        from .cli.program import run_program
    except KeyboardInterrupt:
        sys.stderr.write("gpt_2_simple: interrupted\n")
        return 130
    return run_program()


if __name__ == "__main__":
    sys.exit(run())
