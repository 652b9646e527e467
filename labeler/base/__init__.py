"""The ground that all stand on: errors, settings, command lines, whole files, weights read safely."""
