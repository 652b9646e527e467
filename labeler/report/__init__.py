"""The report: one HTML page that shows what is in a label store."""
