"""The process of one contestant, which `llm.bench.contest.Worker` starts.

What its own child processes import again is no more than this.
"""

import json
import sys

if __name__ == "__main__":
    from llm.bench import contest_of
    from llm.bench.contest import serve

    kind, name, sizes = json.loads(sys.argv[1])
    serve(contest_of(kind), name, sizes)
