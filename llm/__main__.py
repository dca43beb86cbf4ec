"""`python -m llm`: the command line."""

import gc
import sys

if __name__ == "__main__":
    gc.set_threshold(50_000)  # the modules of torch stay: fewer looks for garbage among them
    from llm.cli.main import main

    for file in (sys.stdout, sys.stderr):
        file.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(main())
