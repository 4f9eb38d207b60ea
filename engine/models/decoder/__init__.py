"""Which part of a `transformers` model is its text decoder, built empty and measured."""
