"""What do rooms hand each other? Batches, models, plans of cuts, and maps of weight names."""
