"""``tessera deploy``: answers over HTTP, in the words of OpenAI's API."""
