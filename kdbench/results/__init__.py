"""Results of runs: result.json read, put into rows, and shown; no torch."""
