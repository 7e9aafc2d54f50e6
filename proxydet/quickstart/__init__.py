"""The whole job on a small data set drawn here: make data, train, evaluate, predict, report."""
