"""What a training step holds: exact counts on the meta device, and a traced step at any batch and length."""
