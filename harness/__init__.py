"""Asks and scores: turns run entries into requests, requests into answers, answers into tables.

The harness knows text, HELM and files; it knows no tensors. It asks the engine through
``engine.Engine`` alone. Import what you need from the submodules: this package imports nothing,
so that ``--help`` and the commands that need no HELM stay fast.
"""
