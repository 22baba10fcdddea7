"""Training stages: the autoencoder and the diffusion transformer."""
