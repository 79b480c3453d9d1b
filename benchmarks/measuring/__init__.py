"""What benchmarks share: turns in one process, real texts, bootstrap intervals, operation counts, the machine."""
