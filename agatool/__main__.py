"""`python -m agatool`, so that `torchrun -m agatool` works."""

from agatool.cli import main

if __name__ == "__main__":
    main()
