"""HELM: run entries, its runner, the registration of models, its client and tokenizer window."""
