"""The suites: each measures a part of the project in turns with what one would use instead."""
