"""A detector behind HTTP: a web page and a JSON endpoint."""
