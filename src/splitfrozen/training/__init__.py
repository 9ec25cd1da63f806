"""Training: batches and their order, lifting, gradients, the loop and evaluation."""
