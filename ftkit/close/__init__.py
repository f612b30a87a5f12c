"""A quantised file comes nearer to the trained model, by the numbers that it stores without loss."""
