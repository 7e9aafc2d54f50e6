"""Videos and cameras: decoded ahead of the network, drawn and encoded behind it."""
