"""The web page and the JSON endpoint: a detector behind HTTP, for one machine."""
