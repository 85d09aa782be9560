"""What policies act in: PickPlace, and the suites of other benchmarks."""
