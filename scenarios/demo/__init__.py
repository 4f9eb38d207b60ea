"""The bundled demo model: its recipe as code, its checkpoint, its model card.

``python -m scenarios.demo.train`` trains ``scenarios/demo/model``; ``python -m scenarios.demo.evaluate``
measures it with plain transformers. Both need HELM for the synthetic tasks only.
"""
