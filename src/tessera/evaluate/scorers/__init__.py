"""Rules that judge answers: pure functions of text, one module per kind of answer, one function per author's rule."""
