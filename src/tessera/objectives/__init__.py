"""What is optimised: pure functions from hidden states and a batch to a sum and its weight."""
