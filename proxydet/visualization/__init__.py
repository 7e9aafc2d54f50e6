"""Drawing, plots and the HTML report."""
