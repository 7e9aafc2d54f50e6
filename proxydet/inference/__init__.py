"""Jobs over images: which files, what is run on them, and what is written."""
