"""`python -m visionloop`: the same as the command `visionloop`."""

from visionloop.cli import main

if __name__ == "__main__":
    main()
