"""tessera: train, export and run vision-language models with one torch-native engine.

The rooms of the house (see ``docs/``): ``config`` says what is run, ``contract`` what rooms hand each other, ``data``
makes batches, ``models`` compute, ``weights`` name things on disk, ``parallel`` places them, ``adapt`` chooses what is
trainable, ``objectives`` what is optimised, ``train`` in which order, ``checkpoint`` what survives a crash,
``observe`` what a person sees, ``infer`` what the result says, ``recipes`` what is recommended.

Importing this package imports nothing else, so that ``tessera --help`` answers at once.
"""

from __future__ import annotations

__version__ = "0.1.0"
