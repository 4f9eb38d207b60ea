"""Tasks of lm-evaluation-harness, answered by the engine."""
