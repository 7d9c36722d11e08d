"""`python -m agatool`."""

from agatool.cli import main

if __name__ == "__main__":
    main()
