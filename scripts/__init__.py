"""Demo, benchmarks and cluster recipes. Imports anything; nothing imports it."""
