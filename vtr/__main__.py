"""``python -m vtr``: the command line."""

from vtr.cli.commands import main

if __name__ == "__main__":
    main()
