"""What all packages share: errors, settings, command lines, atomic file writes, safe reading of weights."""
