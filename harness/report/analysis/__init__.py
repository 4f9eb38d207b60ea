"""What a report concludes: paired tests, bits, frontiers, the paper's tables."""
