"""Pictures and tables of the documents, made from committed results."""
