"""``python -m crp`` is the command ``crp``."""

from __future__ import annotations

from crp.commands.cli import cli, main

__all__ = ["cli"]

if __name__ == "__main__":
    main()
