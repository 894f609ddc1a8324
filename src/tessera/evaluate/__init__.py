"""Does it work afterwards? Benchmarks in their published files, asked of a model and scored as their authors score."""
