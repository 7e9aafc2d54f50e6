"""Regions of many images, embedded once and searched from any class names later, without the images and without the network."""
