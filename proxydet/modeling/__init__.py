"""The network: backbone, FPN, proposals, cascades, classifier, fusion, masks."""
