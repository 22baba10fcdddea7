"""Plain torch: networks, diffusion mathematics, samplers, and the artifacts that carry them."""
