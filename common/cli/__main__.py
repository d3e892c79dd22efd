"""Run the command line as `python -m common.cli`."""

from common.cli.main import main

if __name__ == "__main__":
    main()
