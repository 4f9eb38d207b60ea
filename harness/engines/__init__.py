"""Engines for those who ask: their settings, the protocol that suites need, a policy found automatically."""
