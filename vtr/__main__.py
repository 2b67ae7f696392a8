"""``python -m vtr``: the command line."""

from vtr.cli import main

if __name__ == "__main__":
    main()
