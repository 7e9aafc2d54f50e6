"""Class names, their text embeddings, and which of them are base classes."""
