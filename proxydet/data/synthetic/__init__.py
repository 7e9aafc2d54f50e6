"""A small open-vocabulary data set that is drawn here: coloured, textured shapes in LVIS format."""
