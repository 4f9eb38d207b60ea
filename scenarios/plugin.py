"""Importing this module registers all scenarios of this package with HELM.

For stock HELM::

    PYTHONPATH=. helm-run --plugins scenarios.plugin --run-entries information_extraction:seed=7,model=...
"""

from scenarios import (  # noqa: F401
    data_imputation,
    demo_text,
    error_detection,
    form_processing,
    information_extraction,
    key_value_recall,
    product_matching,
    product_ranking,
)
