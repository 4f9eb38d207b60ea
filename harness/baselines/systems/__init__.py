"""One file per system, imported in the system's own process and environment."""
