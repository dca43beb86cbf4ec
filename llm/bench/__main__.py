"""The process of one implementation, which `llm.bench.harness.Worker` starts.

Its own child processes import no more than this again.
"""

import json
import sys

if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("["):
        sys.exit("llm.bench is the process of one implementation: run `python -m llm bench --help`")
    from llm.bench.harness import load_benchmark, serve

    kind, name, sizes = json.loads(sys.argv[1])
    serve(load_benchmark(kind), name, sizes)
