"""The command line: `visionloop`. Thin: each command builds what it needs and calls one function.

Heavy imports live inside the handlers: `--help` must answer at once. Only this package prints.
"""

from visionloop.cli.run import main, run_process

__all__ = ["main", "run_process"]
