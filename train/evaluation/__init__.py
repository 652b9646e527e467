"""Evaluation of a trained model: accuracy on a folder, classes of single images."""
