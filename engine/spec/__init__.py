"""The engine's nouns: frozen dataclasses, free of torch."""
