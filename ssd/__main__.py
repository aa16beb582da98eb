"""``python -m ssd`` is the command ``ssd``."""

from ssd.cli import main

if __name__ == "__main__":
    main()
