"""Augmentation: views of images by number, strong ones by seed, and mixtures of two images."""
