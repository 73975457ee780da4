"""`python -m data_tools.cli` is the command hunyuan-data."""

from data_tools.cli import main

if __name__ == "__main__":
    main()
