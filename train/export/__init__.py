"""`export`: a trained network as one file for another runtime, checked against the run on real images."""
