"""What survives a crash, and the one door through which a model is opened."""
