"""Demo, benchmarks, evidence, fuzzing, check of a GPU, cluster recipes. Imports anything; nothing imports it."""
