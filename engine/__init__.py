"""The offloading engine: answers batches of token-id requests within fixed memory budgets.

Spec names it, plan decides it, memory moves it, models compute it, the executor walks it.
Import what you need from the submodules (``from engine.engine import Engine``); this package
imports nothing by itself, so that ``engine.spec`` and ``engine.plan`` stay free of torch.
"""
