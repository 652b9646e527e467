"""What a trained model answers: accuracy on a folder, classes of single images."""
