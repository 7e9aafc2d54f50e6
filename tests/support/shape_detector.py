"""A small random network of the tiny recipe that finds a lot, and the classes that it is asked for."""

from __future__ import annotations

import dataclasses

import torch

from proxydet.modeling.network import ProxyDetNetwork
from proxydet.recipes import get_recipe
from proxydet.vocabulary.vocabulary import Vocabulary

WORDS = ["red", "blue", "green", "circle", "square", "star"]
CLASSES = ["red circle", "blue square", "green star", "blue circle"]


def random_network(vocabulary: Vocabulary) -> ProxyDetNetwork:
    """Fresh heads score everything alike; larger weights make scores that differ."""
    torch.manual_seed(5)
    model = get_recipe("tiny").model
    classifier = dataclasses.replace(model.classifier, embedding_dim=vocabulary.dimension)
    network = ProxyDetNetwork(dataclasses.replace(model, classifier=classifier), vocabulary)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("roi_heads.") and parameter.ndim > 1:
                parameter.mul_(6)
    return network
