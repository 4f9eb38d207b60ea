"""Batch files in OpenAI's format: requests in, results out, continued after a kill."""
