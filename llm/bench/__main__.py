"""The process of one implementation, which `llm.bench.harness.Worker` starts.

Its own child processes import no more than this again.
"""

import json
import sys

if __name__ == "__main__":
    from llm.bench.harness import load_benchmark, serve

    kind, name, sizes = json.loads(sys.argv[1])
    serve(load_benchmark(kind), name, sizes)
