"""`python -m edgeprune` is the command line."""

from edgeprune.cli import main

if __name__ == "__main__":
    main()
