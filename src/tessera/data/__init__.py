"""How do bytes become a Batch? Rows, media, chat templates, packing, and a loader that threads keep filled."""
