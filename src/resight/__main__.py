"""`python -m resight`, and `torchrun ... -m resight` for several processes: the command line."""

from __future__ import annotations

from resight.cli.main import main

if __name__ == "__main__":
    main()
