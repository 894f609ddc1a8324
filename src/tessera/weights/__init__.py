"""What tensors are called, and how they lie, outside the running model: Hugging Face directories."""
