"""``python -m bdkd``."""

from bdkd.cli import main

if __name__ == "__main__":
    main()
