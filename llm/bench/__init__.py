"""Speed beside other projects: `python -m llm bench`. Weights are random, and nothing is downloaded."""
