"""Label store and images to aligned training batches. Imports `labeler` (the store) only."""
