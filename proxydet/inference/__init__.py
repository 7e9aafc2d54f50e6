"""Jobs over images, videos and cameras: which are meant, what is run on them, and what is written."""
