"""Demo, benchmarks, evidence, fuzzing, the check of a GPU, and cluster recipes. Imports anything; nothing imports it."""
