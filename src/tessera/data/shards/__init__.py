"""Samples in tar files: WebDataset shards, the folders that Energon prepares of them, and how both are made."""
