"""`python -m llm`: the command line."""

import sys

if __name__ == "__main__":
    from llm.cli.main import main

    for file in (sys.stdout, sys.stderr):
        file.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(main())
