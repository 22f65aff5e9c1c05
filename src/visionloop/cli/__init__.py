"""The command line: `visionloop`. Thin: each command builds what it needs and calls one function.

Heavy imports live inside the handlers: `--help` must answer at once. Only this package prints.
"""

import sys
from typing import NoReturn

__all__ = ["main", "run_process"]


def run_process() -> NoReturn:
    """Run the command line as all that this process does. Ctrl-C while it is loaded is no traceback either."""
    try:
        from visionloop.cli.run import run_process as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    """Run the command line; exit as `visionloop.cli.run.main` does."""
    from visionloop.cli.run import main as run

    run()
