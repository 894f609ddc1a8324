"""What is computed: one packed decoder, vision towers, and the model families made of them (single-device code)."""
