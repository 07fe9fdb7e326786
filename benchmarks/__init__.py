"""The benchmark suite: `python -m benchmarks list | run | compare`. README.md says how numbers are taken."""
