"""What is done with a loaded model, whatever program loaded it."""
