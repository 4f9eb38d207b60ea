"""Reads what a report is made from: suites, manifests, single instances."""
