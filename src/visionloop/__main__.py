"""`python -m visionloop`: the same as the command `visionloop`."""

from visionloop.cli import run_process

if __name__ == "__main__":
    run_process()
