"""The proxydet command line: parse, call one function of the core, render."""
