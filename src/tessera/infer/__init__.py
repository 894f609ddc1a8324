"""After training: answers from a model, one conversation at a time or over a whole dataset."""
