"""The architecture check: a tiny random twin of a model against `transformers` itself."""
