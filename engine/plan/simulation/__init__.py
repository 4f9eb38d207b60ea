"""What a pass and a run take: costs, and the schedule simulated over shared resources."""
