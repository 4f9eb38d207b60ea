"""The FlexGen paper's runtime, models and machines, as data and as a simulation."""
