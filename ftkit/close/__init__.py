"""A form of the model comes nearer to the trained one: a quantised file, or an adapter on the 16-bit source."""
