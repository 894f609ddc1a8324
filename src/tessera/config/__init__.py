"""What did we run? One table of flags, one typed tree of their values, one way from a command line to it."""
