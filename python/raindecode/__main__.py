"""``python -m raindecode`` is the same as ``raindecode``."""

from __future__ import annotations

from raindecode.cli import main

if __name__ == "__main__":
    main()
