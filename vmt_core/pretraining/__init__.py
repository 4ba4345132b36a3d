"""How wan-nano is trained: an autoencoder, then a transformer with its text encoder, both from the procedural world on the fly."""
