"""An adapter and its base become one 16-bit model."""
