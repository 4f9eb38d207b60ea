"""Other systems, one file each; imported in their own process and environment."""
