"""What the README claims about speed, measured against peers: `python -m benchmarks.NAME`. Results: RESULTS.md."""
