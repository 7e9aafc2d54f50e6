"""What the browser is given: a page, its style, its scripts."""
