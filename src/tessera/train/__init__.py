"""In what order things happen: the step, the optimisers and their schedule, the loop."""
