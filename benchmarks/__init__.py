"""A folder a subject, a file a figure: `python -m benchmarks.throughput.memory` prints a table and writes JSON to
benchmarks/results/."""
