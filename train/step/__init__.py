"""What a training step needs beside the network: its figures, read late, and an update that can be taken back."""
